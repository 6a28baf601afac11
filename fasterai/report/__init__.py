"""Several prunings side by side, and a page that tells of one."""
