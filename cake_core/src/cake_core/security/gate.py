"""The listening end's door: takes every connection, hands over only those whose peer has proved to hold the cluster key.

Strangers cost little: at most 64 connections without proof at once, 8 of one address, 5 seconds each; when there is no
room the oldest goes. Over a `PollingListener` one thread carries them all, without ever waiting for one of them; over any
other listener each gets a thread, and the limits bound those.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable

from cake_core.errors import CakeError, ChannelClosed, DeadlineExceeded, ProtocolError, TransportError
from cake_core.security.handshake import NONCE, Handshake, authenticate_listener, check_encryption, explain, refuse_body
from cake_core.security.keys import ClusterKey
from cake_core.security.strangers import Complaints, Limits, Strangers, origin_of
from cake_core.transport import Address, Channel, Listener, PollingChannel, PollingListener

log = logging.getLogger(__name__)

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
        self._strangers = Strangers(self._limits)
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
            self._changed.notify_all()
        self._listener.close()
        self._thread.join(self._limits.seconds)
        self._shut()

    def _shut(self) -> None:
        with self._changed:
            self._closed = True
            left = [*self._strangers, *(channel for channel, _ in self._admitted)]
            self._strangers.clear()
            self._admitted.clear()
            self._changed.notify_all()
        for channel in left:
            channel.abort()

    def _serve(self) -> None:
        try:
            with contextlib.suppress(ChannelClosed):
                if isinstance(self._listener, PollingListener):
                    self._serve_by_polling(self._listener)
                else:
                    self._serve_by_threads()
        except Exception:
            log.exception("%s does not accept connections any more", self.address)
        self._shut()

    # One thread for all

    def _serve_by_polling(self, listener: PollingListener) -> None:
        handshakes: dict[PollingChannel, Handshake] = {}
        while True:
            due = self._strangers.next_deadline()
            new, ready = listener.poll(handshakes, None if due is None else max(0.0, due - time.monotonic()))
            for channel in new:
                for evicted in self._enter(channel):
                    handshakes = {other: state for other, state in handshakes.items() if other is not evicted}
                handshakes[channel] = Handshake(
                    "listener", self._key, self._our_hello(), channel.binding, secrets.token_bytes(NONCE)
                )
            for channel in (*ready, *new):
                if channel in handshakes and self._advance(channel, handshakes[channel]):
                    del handshakes[channel]
            for late in self._strangers.overdue(time.monotonic()):
                self._refuse(late, DeadlineExceeded(f"{late.peer} did not prove itself in {self._limits.seconds:g} s"))
                handshakes = {other: state for other, state in handshakes.items() if other is not late}

    def _advance(self, channel: PollingChannel, handshake: Handshake) -> bool:
        """Takes what has arrived on a channel; whether that settled it."""
        try:
            check_encryption(channel, self._key)
            while not handshake.done:
                message = channel.try_receive(refuse_body)
                if message is None:
                    return False
                for frame in handshake.receive(message[0]):
                    channel.send(frame, (), 0.0)
        except TransportError as error:
            self._refuse(channel, explain(error, channel, handshake, self._limits.seconds))
        else:
            self._settle(channel, handshake.peer_hello)
        return True

    # A thread for each

    def _serve_by_threads(self) -> None:
        while True:
            channel = self._listener.accept()
            self._enter(channel)
            threading.Thread(target=self._examine, args=(channel,), name="cake-gate-peer", daemon=True).start()

    def _examine(self, channel: Channel) -> None:
        try:
            answer = authenticate_listener(channel, self._key, self._our_hello(), self._limits.seconds)
        except TransportError as error:
            self._refuse(channel, error)
        else:
            self._settle(channel, answer)

    # Both

    def _our_hello(self) -> bytes:
        return self._hello if isinstance(self._hello, bytes) else self._hello()

    def _enter(self, channel: Channel) -> list[Channel]:
        """Gives a connection a slot; those that lost theirs, aborted."""
        with self._changed:
            evicted = self._strangers.enter(channel, time.monotonic())
            closed = self._closed
        for other in [*evicted, channel] if closed else evicted:
            other.abort()
        for other in evicted:
            self._complaints.say(f"{self.address}: too many connections without proof; dropped {other.peer}")
        return evicted

    def _settle(self, channel: Channel, hello: bytes) -> None:
        try:
            if self._check is not None:
                self._check(hello, channel.peer)
        except CakeError as error:
            self._refuse(channel, error, proved=True)
            return
        except Exception as error:
            # A bug in a check must not close the door for everybody else.
            log.exception("%s: the check of %s failed", self.address, channel.peer)
            self._refuse(channel, ProtocolError(f"{channel.peer}: internal error: {error}"), proved=True)
            return
        with self._changed:
            if self._strangers.leave(channel) and not self._closed:
                self._admitted.append((channel, hello))
                self._changed.notify()
                return
        channel.abort()

    def _refuse(self, channel: Channel, error: CakeError, proved: bool = False) -> None:
        with self._changed:
            expected = not self._strangers.leave(channel)  # it was evicted, or the gate is closing
        if proved:
            channel.close()  # in order: our proof and hello still arrive, so the other end can say the same
        else:
            channel.abort()
        if not expected:
            subject = f"{origin_of(channel.peer)} {type(error).__name__}"
            self._complaints.say(f"refused a connection to {self.address}: {error}", subject)
