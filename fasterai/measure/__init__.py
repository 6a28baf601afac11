"""What a network costs: parameters, MACs, bytes, latency; tables and pictures."""
