"""Schedules, granularities, criteria and masks: all that needs no run of a network."""
