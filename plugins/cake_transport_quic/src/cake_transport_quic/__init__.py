"""Cake transport plugin: messages over QUIC (experimental)."""
