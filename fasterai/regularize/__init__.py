"""Penalties on groups of weights, so that removing them later costs less."""
