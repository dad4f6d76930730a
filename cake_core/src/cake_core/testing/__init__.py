"""What a plugin's author tests with: contract kits, toy models and an in-memory transport. Nothing in core imports it but
`builtin`, which registers the toys. The kits (`contracts`) need the extra `testing`; the rest needs nothing."""
