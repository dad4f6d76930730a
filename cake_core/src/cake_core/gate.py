"""The listening end's door: takes every connection, hands over only those whose peer has proved to hold the cluster key.

Strangers cost little: at most 64 connections without proof at once, 8 of one address, 5 seconds each; when there is no
room the oldest goes. The transport's thread safety is all that is relied on, so this works over any transport.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cake_core.errors import CakeError, ChannelClosed, DeadlineExceeded, NodeMismatch
from cake_core.handshake import authenticate_listener
from cake_core.keys import ClusterKey
from cake_core.transport import Address, Channel, Listener

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What connections without proof may take."""

    slots: int = 64
    slots_per_origin: int = 8
    seconds: float = 5.0


Check = Callable[[bytes, str], None]
"""`check(hello, peer)` looks at the hello of a peer that has proved itself, and raises a CakeError to turn it away."""


class Gate:
    """`accept` returns authenticated channels and their peers' hellos. `hello` is ours, or makes ours for each peer."""

    def __init__(
        self,
        listener: Listener,
        key: ClusterKey | None,
        hello: bytes | Callable[[], bytes],
        check: Check | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.address: Address = listener.address
        self._listener = listener
        self._key = key
        self._hello = hello
        self._check = check
        self._limits = limits or Limits()
        self._waiting: dict[Channel, str] = {}  # in order of arrival, with their origins
        self._admitted: deque[tuple[Channel, bytes]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._complaints = Complaints()
        self._thread = threading.Thread(target=self._serve, name="cake-gate", daemon=True)
        self._thread.start()

    def accept(self, timeout: float | None = None) -> tuple[Channel, bytes]:
        """The next authenticated peer. Raises ChannelClosed after `close`, DeadlineExceeded after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or self._admitted, timeout):
                raise DeadlineExceeded(f"nobody with the cluster key connected to {self.address} in time")
            if self._closed:
                raise ChannelClosed(f"{self.address} is closed")
            return self._admitted.popleft()

    def close(self) -> None:
        """Stops listening and ends every connection that `accept` has not returned. Idempotent."""
        with self._changed:
            self._closed = True
            left = [*self._waiting, *(channel for channel, _ in self._admitted)]
            self._waiting.clear()
            self._admitted.clear()
            self._changed.notify_all()
        self._listener.close()
        for channel in left:
            channel.abort()
        self._thread.join(self._limits.seconds)

    def _serve(self) -> None:
        with contextlib.suppress(ChannelClosed):
            while True:
                channel = self._listener.accept()
                for evicted in self._enter(channel):
                    evicted.abort()
                threading.Thread(target=self._examine, args=(channel,), name="cake-gate-peer", daemon=True).start()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _enter(self, channel: Channel) -> list[Channel]:
        """Gives a connection a slot; those that lose theirs."""
        origin = origin_of(channel.peer)
        with self._changed:
            if self._closed:
                return [channel]
            same = [other for other, where in self._waiting.items() if where == origin]
            evicted = same[: max(0, len(same) - self._limits.slots_per_origin + 1)]
            if not evicted and len(self._waiting) >= self._limits.slots:
                evicted = [next(iter(self._waiting))]
            for other in evicted:
                del self._waiting[other]
            self._waiting[channel] = origin
            return evicted

    def _examine(self, channel: Channel) -> None:
        hello = self._hello if isinstance(self._hello, bytes) else self._hello()
        try:
            answer = authenticate_listener(channel, self._key, hello, self._limits.seconds)
            if self._check is not None:
                self._check(answer, channel.peer)
        except CakeError as error:
            self._refuse(channel, error)
        else:
            self._admit(channel, answer)

    def _refuse(self, channel: Channel, error: CakeError) -> None:
        with self._changed:
            evicted = self._waiting.pop(channel, None) is None
        if isinstance(error, NodeMismatch):
            channel.close()  # in order: our proof and hello still arrive, so the other end can say the same
        else:
            channel.abort()
        if not evicted:
            self._complaints.say(f"refused a connection to {self.address}: {error}")

    def _admit(self, channel: Channel, hello: bytes) -> None:
        with self._changed:
            if self._waiting.pop(channel, None) is not None and not self._closed:
                self._admitted.append((channel, hello))
                self._changed.notify()
                return
        channel.abort()


class Complaints:
    """Logs warnings, a few a minute: a flood of strangers must not become a flood of lines."""

    def __init__(self, most: int = 10, seconds: float = 60.0) -> None:
        self._most = most
        self._seconds = seconds
        self._since = -seconds
        self._said = 0
        self._kept = 0
        self._lock = threading.Lock()

    def say(self, text: str, now: float | None = None) -> None:
        now = time.monotonic() if now is None else now
        with self._lock:
            if now - self._since >= self._seconds:
                self._since, self._said = now, 0
            if self._said >= self._most:
                self._kept += 1
                return
            self._said += 1
            more, self._kept = self._kept, 0
        log.warning("%s%s", text, f" ({more} more like this were not logged)" if more else "")


def origin_of(peer: str) -> str:
    """Whom a connection counts for: an IPv4 address, an IPv6 network (one owner has a whole /64), else the peer's text."""
    host = peer.rpartition(":")[0].strip("[]") or peer
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
