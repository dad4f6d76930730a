"""Cake model plugin: Llama and its kin as a sharded text backend."""
