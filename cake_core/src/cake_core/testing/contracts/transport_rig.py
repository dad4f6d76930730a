"""What the transport kit works with: two connected ends, and short words for sending and receiving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest

from cake_core.model import Buffer
from cake_core.testing.contracts.threads import PATIENCE, Task
from cake_core.transport import Address, Channel, Identity, Listener, Transport

MIB = 1024 * 1024
NewIdentity = Callable[[], Identity]


def anything(header: bytes, length: int) -> memoryview:
    """An `allocate` that accepts every body."""
    return memoryview(bytearray(length))


def send(channel: Channel, header: bytes, *buffers: Buffer) -> None:
    channel.send(header, buffers, PATIENCE)


def receive(channel: Channel) -> tuple[bytes, bytes]:
    header, body = channel.receive(anything, PATIENCE)
    return header, bytes(body)


@dataclass(frozen=True, slots=True)
class Ends:
    """Two connected channels: `a` and `b` are the dialled and the accepted one, in either order."""

    a: Channel
    b: Channel


def connect(transport: Transport, listener: Listener, identity: Identity | None) -> tuple[Channel, Channel]:
    """A dialled and an accepted channel that have spoken once: an encryption handshake needs both sides to take part."""

    def accept() -> Channel:
        channel = listener.accept(PATIENCE)
        assert receive(channel) == (b"hello", b"")
        send(channel, b"welcome")
        return channel

    accepting = Task(accept)
    dialled = transport.dial(listener.address, identity, PATIENCE)
    send(dialled, b"hello")
    accepted = accepting.result()
    assert receive(dialled) == (b"welcome", b"")
    return dialled, accepted


class TransportRig:
    """Fixtures of the kit. A plugin's test class overrides `transport` and `address`, and `new_identity` to encrypt."""

    @pytest.fixture
    def transport(self) -> Transport:
        raise NotImplementedError("the test class must have a fixture `transport` that returns the Transport")

    @pytest.fixture
    def address(self) -> Address:
        raise NotImplementedError("the test class must have a fixture `address`: where to listen, with port 0")

    @pytest.fixture
    def new_identity(self) -> NewIdentity | None:
        """Makes another Identity with each call; None tests without encryption."""
        return None

    @pytest.fixture
    def identity(self, new_identity: NewIdentity | None) -> Identity | None:
        return None if new_identity is None else new_identity()

    @pytest.fixture
    def listener(self, transport: Transport, address: Address, identity: Identity | None) -> Iterator[Listener]:
        listener = transport.listen(address, identity)
        yield listener
        listener.close()

    @pytest.fixture(params=["dialler is a", "listener is a"])
    def ends(
        self, request: pytest.FixtureRequest, transport: Transport, listener: Listener, identity: Identity | None
    ) -> Iterator[Ends]:
        dialled, accepted = connect(transport, listener, identity)
        yield Ends(dialled, accepted) if request.param == "dialler is a" else Ends(accepted, dialled)
        dialled.abort()
        accepted.abort()


def stream(channel: Channel, count: int, body: Sequence[Buffer]) -> None:
    """Sends `count` numbered messages."""
    for index in range(count):
        channel.send(b"%d" % index, body, PATIENCE)


def drain(channel: Channel, count: int) -> list[bytes]:
    """Headers of the next `count` messages."""
    return [receive(channel)[0] for _ in range(count)]
