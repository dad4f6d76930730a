"""Connections between processes: dialling, requests and answers over one channel, what a node reports."""
