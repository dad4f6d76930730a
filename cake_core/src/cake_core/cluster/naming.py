"""Errors of a node, with its name and address in them."""

from __future__ import annotations

from cake_core.errors import AuthenticationError, CakeError, NodeError, NodeLost, ProtocolError, TransportError


def named(error: CakeError, name: str, address: str) -> CakeError:
    """The error as a NodeError of this node, where it may be one."""
    if isinstance(error, NodeError):
        error.node, error.address = name, address
        return error if str(error).startswith(name) else type(error)(f"{name}: {error}", name, address)
    if isinstance(error, AuthenticationError | ProtocolError):
        return error
    if isinstance(error, TransportError):
        return NodeLost(f"{name} at {address} is gone: {error}", name, address)
    return error
