"""Stages as the engines see them: local, remote, or several devices as one."""
