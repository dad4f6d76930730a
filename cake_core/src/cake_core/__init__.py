"""Cake's core: topology, hooks and scheduling for distributed inference. It knows no model and no network."""

__version__ = "0.1.0"

from cake_core.hookspecs import hookimpl as hookimpl
