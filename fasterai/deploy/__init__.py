"""Bring what was trained elsewhere: save and load."""
