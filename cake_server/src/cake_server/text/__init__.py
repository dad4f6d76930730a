"""Text between HTTP and the engine: request fields, prompts, and answers as they come."""
