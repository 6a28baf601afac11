"""Learning from a dense network while becoming sparse or small."""
