"""What both halves share: schedules, granularities, criteria, masks. Knows tensors, not networks."""
