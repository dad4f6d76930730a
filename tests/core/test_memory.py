"""The in-memory transport through the kit, and what the kit cannot ask of every transport."""

from __future__ import annotations

import itertools

import pytest

from cake_core.errors import ChannelClosed, NodeUnreachable, TransportError
from cake_core.testing.contracts import TransportContract
from cake_core.testing.contracts.threads import Task
from cake_core.testing.contracts.transport_rig import connect
from cake_core.testing.memory import DEFAULT_BUFFER, MemoryTransport
from cake_core.transport import Address, Identity

ANYWHERE = Address("here", 0, "memory")


class TestMemory(TransportContract):
    most_in_flight = 2 * DEFAULT_BUFFER

    @pytest.fixture
    def transport(self):
        return MemoryTransport()

    @pytest.fixture
    def address(self):
        return ANYWHERE


class TestMemoryWithIdentity(TestMemory):
    largest = 1024 * 1024

    @pytest.fixture
    def new_identity(self):
        numbers = itertools.count()
        return lambda: Identity(b"certificate %d" % next(numbers), b"key")


class TestMemoryWithHardlyAnyBuffer(TestMemory):
    """Nothing can hide in a buffer: what deadlocks anywhere deadlocks here."""

    largest = 1024
    most_in_flight = 2 * DEFAULT_BUFFER

    @pytest.fixture
    def transport(self):
        return MemoryTransport(buffer=4096)


def test_networks_are_apart():
    listener = MemoryTransport().listen(ANYWHERE, None)
    with pytest.raises(NodeUnreachable, match="nobody listens"):
        MemoryTransport().dial(listener.address, None, 1)


def test_one_sided_encryption_is_named():
    transport = MemoryTransport()
    listener = transport.listen(ANYWHERE, None)
    with pytest.raises(TransportError, match="only one side"):
        transport.dial(listener.address, Identity(b"c", b"k"), 1)


def test_closing_a_listener_ends_what_it_had_not_accepted():
    transport = MemoryTransport()
    listener = transport.listen(ANYWHERE, None)
    dialled = transport.dial(listener.address, None, 1)
    listener.close()
    with pytest.raises(ChannelClosed):
        dialled.receive(lambda header, length: memoryview(bytearray(length)), 1)


def test_an_error_in_allocate_ends_the_channel():
    transport = MemoryTransport()
    dialled, accepted = connect(transport, transport.listen(ANYWHERE, None), None)
    Task(lambda: dialled.send(b"h", [b"body"], 5)).result()
    with pytest.raises(ZeroDivisionError):
        accepted.receive(lambda header, length: memoryview(bytearray(1 // 0)), 1)
    with pytest.raises(ChannelClosed):
        dialled.send(b"h", [b"body"], 5)
