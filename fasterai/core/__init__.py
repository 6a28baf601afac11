"""Schedules, granularities, criteria and masks: knows tensors, not networks."""
