"""What is fuzzed: each takes bytes of an enemy and may only return, or raise ProtocolError or AuthenticationError."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cake_core.assignment import Assignment
from cake_core.cluster.expectation import Expectation
from cake_core.errors import AuthenticationError, CakeError, ProtocolError
from cake_core.framing import Inbox
from cake_core.profiles import NodeProfile
from cake_core.security.handshake import NONCE, Handshake
from cake_core.security.hello import check_hello
from cake_core.security.keys import ClusterKey
from cake_core.transport import MAX_BODY, Address
from cake_core.weights.manifest import is_name
from cake_core.weights.store import Store
from cake_core.weights.supply import ImageSupply
from cake_core.wire.bodies import BodyReader
from cake_core.wire.codec import error_from_fields, spec_from_fields
from cake_core.wire.protocol import Type, decode

KEY = ClusterKey(bytes(range(32)))
LIMIT = 1 << 20
EXPECTED = Expectation("text", (("lm_head",),), {"hidden_size": 64}, {"lm_head": "0" * 64})


def handshake(data: bytes) -> None:
    """Both roles, at each of their steps; nobody without the key may get through."""
    peer = Handshake("dialler", KEY, b"peer", b"b", bytes(NONCE))
    for before in (0, 1):
        victim = Handshake("listener", KEY, b"victim", b"b", b"n" * NONCE)
        if before:
            victim.receive(peer.open()[0])
        _feed(victim, data)
    victim = Handshake("dialler", KEY, b"victim", b"b", b"n" * NONCE)
    victim.open()
    _feed(victim, data)


def _feed(victim: Handshake, data: bytes) -> None:
    with contextlib.suppress(ProtocolError, AuthenticationError):
        victim.receive(data)
    if victim.done:
        raise RuntimeError("the key is not needed")


def stream(data: bytes) -> None:
    """In pieces of several sizes; never more memory than was announced and allowed."""

    def allocate(header: bytes, length: int) -> memoryview:
        if not 0 < length <= MAX_BODY:
            raise RuntimeError(f"{length} bytes are over the limit, or none")
        if length > LIMIT:
            raise ProtocolError("more than this receiver wants")
        return memoryview(bytearray(length))

    for step in (1 << 20, 7):
        inbox, left = Inbox(), memoryview(data)
        with contextlib.suppress(ProtocolError):
            while True:
                while inbox.next(allocate) is not None:
                    pass
                if not left:
                    break
                space = inbox.space()
                count = min(step, len(space), len(left))
                space[:count] = left[:count]
                inbox.arrived(count)
                left = left[count:]


def _report(fields: Mapping[str, Any]) -> None:
    EXPECTED.check(fields, "node", "there")


def _fetch(fields: Mapping[str, Any]) -> None:
    ImageSupply().piece(fields["file"], fields["piece"])
    Store(Path("nowhere")).path(fields["file"])


READERS: Mapping[Type, Callable[[Mapping[str, Any]], object]] = {
    Type.ATTACHED: _report,
    Type.OPEN: lambda fields: spec_from_fields(fields["spec"]),
    Type.ERROR: error_from_fields,
    Type.NEXT: lambda fields: Address.parse(fields["host"]),
    Type.PROFILED: lambda fields: NodeProfile.from_fields(fields["profile"]),
    Type.ASSIGN: lambda fields: Assignment.from_fields(fields).key,
    Type.LOADED: lambda fields: error_from_fields(fields["error"]),
    Type.FETCH: _fetch,
    Type.HOLDS: lambda fields: [name for name in fields["files"] if is_name(name)],
}
"""What reads the fields further than `decode` does: each may raise a CakeError, which is answered, and nothing else."""


def protocol(data: bytes) -> None:
    """The decoder, and the memory it would have allocated for the body."""
    with contextlib.suppress(ProtocolError):
        message = decode(data)
        if message.body_length < 0:
            raise RuntimeError("a negative length")
        with contextlib.suppress(ProtocolError):
            memory = BodyReader(LIMIT).allocate(data, min(message.body_length, LIMIT))
            message.tensors(memory)
        read = READERS.get(message.type)
        if read is not None:
            with contextlib.suppress(CakeError):
                read(message.fields)
    with contextlib.suppress(ProtocolError):
        BodyReader(LIMIT).allocate(data, LIMIT + 1)


def hello(data: bytes) -> None:
    from cake_core.errors import NodeMismatch

    with contextlib.suppress(ProtocolError, NodeMismatch):
        check_hello(data, "peer")


TARGETS = {"handshake": handshake, "stream": stream, "protocol": protocol, "hello": hello}
