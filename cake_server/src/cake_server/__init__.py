"""Cake's REST API: OpenAI-compatible server for whichever model plugin is active."""
