"""A channel whose other end is an attacker written as a generator, and the victims it is tried on."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Generator

from cake_core.errors import ChannelClosed, DeadlineExceeded, TransportError
from cake_core.security.handshake import authenticate_dialler, authenticate_listener
from cake_core.security.keys import ClusterKey
from cake_core.transport import Channel

KEY = ClusterKey(bytes(range(32)))
OTHER = ClusterKey(bytes(range(1, 33)))
BINDING = b"certificate of the listener"
Attacker = Generator[bytes | None, bytes, None]
"""Yields a frame to send it to the victim, or None to be given the victim's next frame."""


def heard(caplog, text: str) -> bool:
    """Whether a gate logs `text`, soon: its own thread does so after the peer has its answer."""
    until = time.monotonic() + 20
    while text not in caplog.text and time.monotonic() < until:
        time.sleep(0.01)
    return text in caplog.text


class Puppet(Channel):
    """`encrypted` as TLS would be; what the victim receives is what the attacker yields."""

    encrypted = True
    peer = "attacker:1"

    def __init__(self, attacker: Attacker, binding: bytes = BINDING) -> None:
        self.binding = binding
        self.said: list[bytes] = []
        self._attacker = attacker
        self._unread: deque[bytes] = deque()
        self._next = self._step(None)

    def _step(self, answer):
        try:
            return self._attacker.send(answer)
        except StopIteration:
            return b""

    def send(self, header, buffers=(), timeout=None):
        self.said.append(header)
        self._unread.append(header)

    def receive(self, allocate, timeout=None):
        while self._next is None:
            if not self._unread:
                raise DeadlineExceeded("each waits for the other")
            self._next = self._step(self._unread.popleft())
        if not self._next:
            raise ChannelClosed("the attacker has left")
        frame, self._next = self._next, self._step(None)
        return frame, memoryview(b"")

    def close(self):
        self._attacker.close()

    abort = close


def listener_takes(attacker: Attacker, key: ClusterKey | None = KEY, binding: bytes = BINDING) -> bool:
    """Whether a listener believes that the attacker, who dialled it, holds the key."""
    return _passed(authenticate_listener, attacker, key, binding)


def dialler_takes(attacker: Attacker, key: ClusterKey | None = KEY, binding: bytes = BINDING) -> bool:
    """Whether a dialler believes that the attacker, whom it dialled, holds the key."""
    return _passed(authenticate_dialler, attacker, key, binding)


def _passed(authenticate, attacker, key, binding):
    try:
        authenticate(Puppet(attacker, binding), key, b"victim", 1.0)
    except TransportError:
        return False
    return True


def overheard(attacker: Attacker) -> list[bytes]:
    """Everything a listener says to an attacker who dials it."""
    channel = Puppet(attacker)
    with contextlib.suppress(TransportError):  # the attacker only wanted to listen
        authenticate_listener(channel, KEY, b"victim", 1.0)
    return channel.said
