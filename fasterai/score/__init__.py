"""What data says about weights: scores gathered over a loader or while training."""
