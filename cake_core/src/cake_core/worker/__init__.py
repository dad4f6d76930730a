"""A worker: the process that serves layers to masters."""
