"""What is closed leaves nothing behind."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from cake_core.errors import CakeError, ChannelClosed, ConfigError, DeadlineExceeded
from cake_core.security import make_identity
from cake_core.transport import Address
from cake_transport_quic import library
from cake_transport_quic.channel import QuicChannel
from cake_transport_quic.connection import LINGER, Connection
from cake_transport_quic.transport import QuicTransport


def endpoints() -> int:
    return sum(thread.name == "cake-quic" and thread.is_alive() for thread in threading.enumerate())


def test_endpoints_end_with_their_last_connection() -> None:
    before = endpoints()
    identity = make_identity()
    for _ in range(3):
        transport = QuicTransport()
        listener = transport.listen(Address("127.0.0.1", 0, "quic"), identity)
        dialled = transport.dial(listener.address, identity, 10.0)
        dialled.send(b"m", (b"body",))
        accepted = listener.accept(10.0)
        assert accepted.receive(lambda header, length: memoryview(bytearray(length)), 10.0)[0] == b"m"
        dialled.close()
        accepted.close()
        listener.close()
    until = time.monotonic() + 30.0
    while endpoints() > before:
        assert time.monotonic() < until, "an endpoint's thread and sockets outlive its connections"
        time.sleep(0.05)


def test_a_peer_that_dials_again_does_not_keep_a_closed_listener() -> None:
    """The address is free for the next process as soon as the peer has noticed, however often it tries meanwhile."""
    identity, transport = make_identity(), QuicTransport()
    listener = transport.listen(Address("127.0.0.1", 0, "quic"), identity)
    dialled = transport.dial(listener.address, identity, 10.0)
    dialled.send(b"m")
    accepted = listener.accept(10.0)
    listener.close()
    accepted.close()
    with pytest.raises(ChannelClosed):
        dialled.receive(lambda header, length: memoryview(bytearray(length)), 10.0)
    dialled.close()
    until = time.monotonic() + 5 * LINGER
    while True:
        with contextlib.suppress(CakeError):
            transport.dial(listener.address, identity, 0.1).close()
        try:
            transport.listen(listener.address, identity).close()
        except ConfigError:
            assert time.monotonic() < until, "the peer keeps the address by dialling it"
            time.sleep(0.1)
        else:
            break


class Pair:
    """Two ends of one connection without a network: what is sent arrives when a test says so."""

    WHERE = ("127.0.0.1", 1)

    def __init__(self) -> None:
        self.channels: list[QuicChannel] = []
        quic = library.QuicConnection(configuration=library.dialling())
        quic.connect(self.WHERE, time.monotonic())
        self.dialler = Connection(quic, "the listener", lambda call: call(), None)
        first, *rest = [data for data, _ in quic.datagrams_to_send(time.monotonic())]
        configuration = library.listening(make_identity())
        arrival = library.arrival(first, configuration)
        assert arrival is not None
        accepted = library.QuicConnection(configuration=configuration, original_destination_connection_id=arrival.destination)
        self.listener = Connection(accepted, "the dialler", lambda call: call(), b"binding", self.channels.append)
        for data in (first, *rest):
            accepted.receive_datagram(data, self.WHERE, time.monotonic())
        for _ in self.turns():
            self.listener.advance(time.monotonic())
            self.dialler.advance(time.monotonic())
            if self.dialler.established and self.listener.established:
                break

    def carry(self, source: Connection, target: Connection) -> None:
        for data, _ in source.quic.datagrams_to_send(time.monotonic()):
            target.quic.receive_datagram(data, self.WHERE, time.monotonic())

    def turns(self) -> Iterator[None]:
        """Time passes and packets arrive; neither end looks at what they meant."""
        until = time.monotonic() + 20.0
        while time.monotonic() < until:
            self.carry(self.dialler, self.listener)
            self.carry(self.listener, self.dialler)
            yield
            time.sleep(0.001)
        pytest.fail("what was sent has not arrived")

    def open(self) -> tuple[QuicChannel, QuicChannel]:
        known, dialled = len(self.channels), self.dialler.open_channel(b"binding")
        for _ in self.turns():
            self.listener.advance(time.monotonic())
            if len(self.channels) > known:
                return dialled, self.channels[-1]
        raise AssertionError


def test_a_stream_that_is_broken_off_takes_nothing_else_with_it() -> None:
    """The library knows of a peer's reset before it tells us; what is written in between fails on that stream alone."""
    pair = Pair()
    broken, other = pair.open()
    dialled, accepted = pair.open()
    broken.abort()
    with pytest.raises(ChannelClosed):  # noqa: PT012  it is closed in one of the turns
        for _ in pair.turns():
            other.send(b"too late")
    other.abort()
    accepted.send(b"still", (b"here",))
    for _ in pair.turns():
        pair.dialler.advance(time.monotonic())
        with contextlib.suppress(DeadlineExceeded):
            assert dialled.receive(lambda header, length: memoryview(bytearray(length)), 0.0)[0] == b"still"
            break
    assert not pair.listener.failure


def test_a_stream_may_be_broken_off_from_both_ends_at_once() -> None:
    pair = Pair()
    broken, other = pair.open()
    broken.abort()
    for _ in itertools.islice(pair.turns(), 20):
        pass
    other.abort()
    assert not pair.listener.failure
