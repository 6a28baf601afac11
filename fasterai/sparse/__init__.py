"""Write zeros into weights; shapes stay."""
