"""Which channels of a network live and die together, found by running it on channel labels."""
