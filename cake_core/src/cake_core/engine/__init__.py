"""The engines: a loop in a thread around a pure scheduler for text, a queue of jobs for images."""
