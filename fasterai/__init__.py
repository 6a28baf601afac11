"""Make neural networks sparse while they train, then make them small."""

__version__ = "0.5.0"
