"""What two processes tell each other in the handshake, and what must agree before they go on.

A hello is a small CBOR map. It is read only after the proofs, and keys we do not know are let be, so later versions may add
to it; `protocol` is the one that decides.
"""

from __future__ import annotations

import functools
import secrets

import cbor2

from cake_core import __version__
from cake_core.errors import NodeMismatch
from cake_core.wire.cbor import load_map
from cake_core.wire.protocol import PROTOCOL_VERSION

TICKET = 16
"""Bytes of the secret by which a master knows a further channel of a worker that joined it."""


def make_hello(node: str = "", ticket: bytes = b"") -> bytes:
    """Ours, with the name that a worker has in the topology, and the ticket of a master that asked for this channel.
    `process` is random: a restarted process is another one."""
    said = {"protocol": PROTOCOL_VERSION, "cake": __version__, "process": _process(), "node": node, "ticket": ticket}
    return cbor2.dumps({name: value for name, value in said.items() if value})


@functools.cache
def _process() -> bytes:
    return secrets.token_bytes(16)


def hello_node(hello: bytes) -> str:
    """The name a worker gave itself, "" for a peer that gave none. To be called after `check_hello`."""
    return str(load_map(hello).get("node", ""))


def hello_ticket(hello: bytes) -> bytes:
    """The ticket that a worker shows, b"" when it shows none. To be called after `check_hello`."""
    ticket = load_map(hello).get("ticket", b"")
    return ticket if isinstance(ticket, bytes) and len(ticket) == TICKET else b""


def check_hello(hello: bytes, peer: str) -> None:
    """Raises NodeMismatch, with the remedy, for a peer of another protocol version, ProtocolError for what is no hello."""
    said = load_map(hello)
    if said.get("protocol") != PROTOCOL_VERSION:
        raise NodeMismatch(
            f"{peer} runs Cake {_short(said.get('cake'))} with protocol {_short(said.get('protocol'))}, this is Cake "
            f"{__version__} with protocol {PROTOCOL_VERSION}; install the same version on both",
            address=peer,
        )


def _short(value: object) -> str:
    """A peer's word for a log line: short, and nothing that moves a terminal's cursor."""
    text = str(value)[:40]
    return text if text.isprintable() else ascii(text)
