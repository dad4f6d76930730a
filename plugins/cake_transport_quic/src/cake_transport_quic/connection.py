"""One QUIC connection and its channels, a stream each. Used by its endpoint's thread alone, except where said."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cake_core.errors import ProtocolError
from cake_transport_quic import library
from cake_transport_quic.channel import QuicChannel

KEEPALIVE = 0.4
"""Seconds between pings while the connection is used: the system tells that nobody is at a port only when something is
sent there."""
REFUSALS = 2
"""Packets that must come back with nothing heard between: one may be forged, or of a moment in which a peer starts."""
LINGER = 2.0
"""Seconds for which a connection without channels stays, so that what was sent arrives."""

OnChannel = Callable[[QuicChannel], None]


class Connection:
    """`on_channel` gets the channels that the peer opens; None refuses them, as a dialler does."""

    def __init__(
        self,
        quic: library.QuicConnection,
        peer: str,
        run: Callable[[Callable[[], None]], None],
        binding: bytes | None,
        on_channel: OnChannel | None = None,
    ) -> None:
        self.quic = quic
        self.peer = peer
        self.settled = threading.Event()
        """Set, for any thread, when the handshake is done or the connection is over."""
        self.failure = ""
        """Why it is over, once it is."""
        self.identifiers: set[bytes] = {quic.host_cid}
        self.where: object = None
        """The address that was last sent to."""
        self._refusals = 0
        self._run = run
        self._binding = binding
        self._on_channel = on_channel
        self._channels: dict[int, QuicChannel] = {}
        self._half_closed: set[int] = set()
        self._established = False
        self._idle_since: float | None = None
        self._ping_at = 0.0
        self._ending = False
        self._leaving = False

    @property
    def established(self) -> bool:
        return self._established and not self._ending and not self.failure

    def open_channel(self, binding: bytes | None) -> QuicChannel:
        number = self.quic.get_next_available_stream_id()
        channel = self._channel(number, binding)
        # A stream that carries nothing does not exist for the peer: an empty record shows it.
        library.send(self.quic, number, bytes(4))
        return channel

    def advance(self, now: float) -> None:
        """Takes what the connection has to tell, keeps it alive while it is used, ends it when it is not."""
        while (event := self.quic.next_event()) is not None:
            self._take(event)
        if self.failure or not self._established:
            return
        if self._channels:
            self._idle_since = None
            if now >= self._ping_at:
                self._ping_at = now + KEEPALIVE
                self.quic.send_ping(0)
        elif self._idle_since is None:
            self._idle_since = now
        elif now - self._idle_since >= LINGER and not self._ending:
            self._ending = True
            self.quic.close()

    def wake_at(self, now: float) -> float:
        """When `advance` wants to be called at the latest."""
        if not self._established or self._ending:
            return now + KEEPALIVE
        return self._ping_at if self._channels else (now if self._idle_since is None else self._idle_since) + LINGER

    def leave(self) -> None:
        """Takes no more channels. A peer that opens one has heard that the others ended, and hears that this is the end: it
        would try again over this connection otherwise, and keep it from ever being idle."""
        self._leaving = True

    def fail(self, reason: str) -> None:
        self.failure = self.failure or reason
        for channel in self._channels.values():
            channel.lost(reason)
        self._channels.clear()
        self.settled.set()

    def heard(self) -> None:
        """A packet has come."""
        self._refusals = 0

    def refused(self) -> None:
        """A packet has come back, because nobody has the peer's port any more."""
        self._refusals += 1
        if not self._established:
            self.fail(f"{self.peer}: connection refused; start the worker there, and check the port")
        elif self._refusals >= REFUSALS:
            self.fail(f"lost {self.peer}: its process is gone")

    def _take(self, event: object) -> None:
        if isinstance(event, library.StreamDataReceived):
            self._data(event.stream_id, event.data, event.end_stream)
        elif isinstance(event, library.StreamReset | library.StopSendingReceived):
            self._lose(event.stream_id, f"{self.peer} closed the connection")
        elif isinstance(event, library.HandshakeCompleted):
            self._established = True
            self.settled.set()
        elif isinstance(event, library.ConnectionTerminated):
            why = event.reason_phrase or "it is gone"
            self.fail(f"lost {self.peer}: {why}" if event.error_code else f"{self.peer} closed the connection")
        elif isinstance(event, library.ConnectionIdIssued):
            self.identifiers.add(event.connection_id)
        elif isinstance(event, library.ConnectionIdRetired):
            self.identifiers.discard(event.connection_id)

    def _data(self, number: int, data: bytes, last: bool) -> None:
        channel = self._channels.get(number)
        if channel is None:
            if number in self._half_closed or self._on_channel is None or not self._established:
                return
            if self._leaving:
                self._refuse(number)
                return
            channel = self._channel(number, self._binding)
            self._on_channel(channel)
        try:
            channel.arrived(data)
        except ProtocolError as error:
            self._lose(number, f"{self.peer}: {error}")
            library.stop(self.quic, number)
            return
        if last:
            channel.finished(f"{self.peer} closed the connection")
            if channel.closed:
                self._forget(number)

    def _refuse(self, number: int) -> None:
        self._half_closed.add(number)
        library.stop(self.quic, number)
        if not self._channels and not self._ending:
            self._ending = True
            self.quic.close()

    def _channel(self, number: int, binding: bytes | None) -> QuicChannel:
        def post(data: bytes, end: str) -> None:
            self._run(lambda: self._write(number, data, end))

        self._channels[number] = channel = QuicChannel(post, self.peer, binding)
        return channel

    def _write(self, number: int, data: bytes, end: str) -> None:
        if self.failure or number not in self._channels:
            return
        if end == "reset":
            library.stop(self.quic, number)
            self._forget(number)
            return
        if not library.send(self.quic, number, data, last=end == "finish"):
            self._lose(number, f"{self.peer} closed the connection")
            self._forget(number)
        elif end == "finish":
            # Whatever still comes is for nobody; the peer learns from our end that it need not go on.
            self._forget(number)

    def _lose(self, number: int, reason: str) -> None:
        channel = self._channels.get(number)
        if channel is not None:
            channel.lost(reason)
            if channel.closed:
                self._forget(number)

    def _forget(self, number: int) -> None:
        self._channels.pop(number, None)
        self._half_closed.add(number)
