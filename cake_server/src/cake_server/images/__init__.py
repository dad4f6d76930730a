"""Images between HTTP and the engine."""
