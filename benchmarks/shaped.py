"""A shaped network in process: a transport whose messages arrive later, as over a link with a latency and a rate.

Each direction of a channel is a link of its own. A message leaves when the one before it has left, takes its bytes over the
rate, and is there one latency later. The sender waits while more than `buffer` bytes have not left, as with a socket.
Sleeping needs no core, so the nodes compute as fast as they would.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cake_core.model import Buffer
from cake_core.transport import TRANSPORT_API, Address, Allocate, Channel, Identity, Listener, Transport

_DUE = struct.Struct("<d")


@dataclass(frozen=True, slots=True)
class Shape:
    """`latency` in seconds one way, `rate` in bytes a second (0: without limit), `buffer` in bytes."""

    latency: float
    rate: float = 0.0
    buffer: int = 2 * 1024 * 1024


class ShapedChannel(Channel):
    def __init__(self, inner: Channel, shape: Shape) -> None:
        self.encrypted, self.binding, self.peer = inner.encrypted, inner.binding, inner.peer
        self._inner = inner
        self._shape = shape
        self._free_at = 0.0

    def send(self, header: bytes, buffers: Sequence[Buffer] = (), timeout: float | None = None) -> None:
        size = len(header) + sum(memoryview(buffer).nbytes for buffer in buffers)
        taken = size / self._shape.rate if self._shape.rate else 0.0
        self._free_at = max(self._free_at, time.monotonic()) + taken
        if self._shape.rate:
            time.sleep(max(0.0, self._free_at - time.monotonic() - self._shape.buffer / self._shape.rate))
        self._inner.send(_DUE.pack(self._free_at + self._shape.latency) + header, buffers, timeout)

    def receive(self, allocate: Allocate, timeout: float | None = None) -> tuple[bytes, memoryview]:
        header, body = self._inner.receive(lambda header, length: allocate(header[_DUE.size :], length), timeout)
        (due,) = _DUE.unpack_from(header)
        time.sleep(max(0.0, due - time.monotonic()))
        return header[_DUE.size :], body

    def close(self) -> None:
        self._inner.close()

    def abort(self) -> None:
        self._inner.abort()


class _ShapedListener(Listener):
    def __init__(self, inner: Listener, shape: Shape) -> None:
        self.address = inner.address
        self._inner = inner
        self._shape = shape

    def accept(self, timeout: float | None = None) -> Channel:
        return ShapedChannel(self._inner.accept(timeout), self._shape)

    def close(self) -> None:
        self._inner.close()


class ShapedTransport:
    """Another transport behind a shape."""

    api: ClassVar[int] = TRANSPORT_API

    def __init__(self, inner: Transport, shape: Shape) -> None:
        self.scheme = inner.scheme
        self._inner = inner
        self._shape = shape

    def dial(self, address: Address, identity: Identity | None, timeout: float) -> Channel:
        return ShapedChannel(self._inner.dial(address, identity, timeout), self._shape)

    def listen(self, address: Address, identity: Identity | None) -> Listener:
        return _ShapedListener(self._inner.listen(address, identity), self._shape)
