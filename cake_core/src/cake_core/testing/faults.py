"""A transport that misbehaves by a plan: it wraps any other and delays, slows, cuts or corrupts what goes through it.

::

    plan = Faults(delay=0.02, bytes_per_second=1e6, cut_after=100)
    transport = FaultyTransport(MemoryTransport(), plan)

Everything happens on the sending side, in the thread that sends: a delay or a limit of the rate holds the sender up as a
slow link with hardly any buffer would.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from cake_core.errors import ChannelClosed, ConfigError
from cake_core.model import Buffer
from cake_core.transport import TRANSPORT_API, Address, Allocate, Channel, Identity, Listener, Transport


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong with each channel, counted from its beginning and in each direction.

    Attributes:
        delay: seconds every message is late.
        bytes_per_second: rate of the link; 0 for no limit.
        cut_after: messages after which the channel is aborted instead of sending one more; None for never.
        corrupt: number of the message, from 0, of which one bit is flipped; None for none.
        header: whether `corrupt` hits the header rather than the body.
        refuse: dialled connections that are aborted at once, before the first that is let through.
    """

    delay: float = 0.0
    bytes_per_second: float = 0.0
    cut_after: int | None = None
    corrupt: int | None = None
    header: bool = False
    refuse: int = 0

    def __post_init__(self) -> None:
        if self.delay < 0 or self.bytes_per_second < 0 or self.refuse < 0:
            raise ConfigError("delay, bytes_per_second and refuse must not be negative")


class FaultyTransport:
    """`inner` with faults, under its scheme. `sleep` is called with the seconds to wait."""

    api: ClassVar[int] = TRANSPORT_API

    def __init__(self, inner: Transport, faults: Faults, sleep: Callable[[float], None] = time.sleep) -> None:
        self.scheme = inner.scheme
        self.faults = faults
        """May be exchanged at any time: channels look at it with every message."""
        self._inner = inner
        self._sleep = sleep
        self._refused = 0

    def dial(self, address: Address, identity: Identity | None, timeout: float) -> Channel:
        channel = self._inner.dial(address, identity, timeout)
        if self._refused < self.faults.refuse:
            self._refused += 1
            channel.abort()
        return FaultyChannel(channel, lambda: self.faults, self._sleep)

    def listen(self, address: Address, identity: Identity | None) -> Listener:
        return _FaultyListener(self._inner.listen(address, identity), lambda: self.faults, self._sleep)


class _FaultyListener(Listener):
    def __init__(self, inner: Listener, faults: Callable[[], Faults], sleep: Callable[[float], None]) -> None:
        self.address = inner.address
        self._inner, self._faults, self._sleep = inner, faults, sleep

    def accept(self, timeout: float | None = None) -> Channel:
        return FaultyChannel(self._inner.accept(timeout), self._faults, self._sleep)

    def close(self) -> None:
        self._inner.close()


class FaultyChannel(Channel):
    def __init__(self, inner: Channel, faults: Callable[[], Faults], sleep: Callable[[float], None]) -> None:
        self._inner, self._faults, self._sleep = inner, faults, sleep
        self._sending = threading.Lock()
        self._sent = 0

    @property
    def encrypted(self) -> bool:  # type: ignore[override]
        return self._inner.encrypted

    @property
    def binding(self) -> bytes:  # type: ignore[override]
        return self._inner.binding

    @property
    def peer(self) -> str:  # type: ignore[override]
        return self._inner.peer

    def send(self, header: bytes, buffers: Sequence[Buffer] = (), timeout: float | None = None) -> None:
        faults = self._faults()
        with self._sending:
            number, self._sent = self._sent, self._sent + 1
            if faults.cut_after is not None and number >= faults.cut_after:
                self._inner.abort()
                raise ChannelClosed(f"the plan cuts the channel to {self.peer} after {faults.cut_after} messages")
            size = len(header) + sum(memoryview(buffer).nbytes for buffer in buffers)
            wait = faults.delay + (size / faults.bytes_per_second if faults.bytes_per_second else 0.0)
            if wait:
                self._sleep(wait)
            if number == faults.corrupt:
                header, buffers = _corrupted(header, buffers, faults.header)
            self._inner.send(header, buffers, timeout)

    def receive(self, allocate: Allocate, timeout: float | None = None) -> tuple[bytes, memoryview]:
        return self._inner.receive(allocate, timeout)

    def close(self) -> None:
        self._inner.close()

    def abort(self) -> None:
        self._inner.abort()


def _corrupted(header: bytes, buffers: Sequence[Buffer], in_header: bool) -> tuple[bytes, Sequence[Buffer]]:
    """The message with the lowest bit of its middle byte flipped; a body without bytes stays as it is."""
    if in_header:
        return bytes(_flipped(header)), buffers
    body = b"".join(bytes(buffer) for buffer in buffers)
    return header, [_flipped(body)] if body else []


def _flipped(data: bytes) -> bytearray:
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 1
    return changed
