"""Tool calls in a model's text: which family writes them how, and what forces one."""
