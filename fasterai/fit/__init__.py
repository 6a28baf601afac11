"""What callbacks that follow a schedule during a fit have in common."""
