"""Take it out: files, folded norms, other runtimes."""
