"""Cake transport plugin: messages over TCP, with TLS 1.3."""
