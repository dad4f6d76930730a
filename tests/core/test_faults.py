"""A transport with a harmless plan keeps the whole contract; each fault is what the plan says, and nothing else."""

from __future__ import annotations

import pytest

from cake_core.errors import ChannelClosed, ConfigError
from cake_core.testing.contracts import TransportContract
from cake_core.testing.contracts.transport_rig import connect, receive, send
from cake_core.testing.faults import Faults, FaultyTransport
from cake_core.testing.memory import DEFAULT_BUFFER, MemoryTransport
from cake_core.transport import Address

ANYWHERE = Address("here", 0, "memory")


class TestHarmless(TransportContract):
    largest = 8 * DEFAULT_BUFFER
    most_in_flight = 2 * DEFAULT_BUFFER

    @pytest.fixture
    def transport(self):
        return FaultyTransport(MemoryTransport(), Faults())

    @pytest.fixture
    def address(self):
        return ANYWHERE


@pytest.fixture
def pair():
    """Two channels that have exchanged a message each, and the transport that holds their plan."""
    slept = []
    transport = FaultyTransport(MemoryTransport(), Faults(), slept.append)
    dialled, accepted = connect(transport, transport.listen(ANYWHERE, None), None)
    return transport, dialled, accepted, slept


def test_delays_and_rates_hold_the_sender_up(pair):
    transport, dialled, accepted, slept = pair
    transport.faults = Faults(delay=0.5, bytes_per_second=100)
    send(dialled, b"h" * 10, b"b" * 40)
    assert receive(accepted) == (b"h" * 10, b"b" * 40)
    assert slept == [1.0]


def test_cuts_where_the_plan_says(pair):
    transport, dialled, accepted, _ = pair
    transport.faults = Faults(cut_after=2)
    send(dialled, b"second")
    assert receive(accepted) == (b"second", b"")
    with pytest.raises(ChannelClosed, match="after 2 messages"):
        send(dialled, b"third")
    for channel in (dialled, accepted):
        with pytest.raises(ChannelClosed):
            receive(channel)


@pytest.mark.parametrize("header", [False, True])
def test_corrupts_one_bit_of_one_message(pair, header):
    transport, dialled, accepted, _ = pair
    transport.faults = Faults(corrupt=2, header=header)
    for _ in range(3):
        send(dialled, b"header", b"bo", b"dy")
    good, bad = (b"header", b"body"), (b"heaeer", b"body") if header else (b"header", b"boey")
    assert [receive(accepted) for _ in range(3)] == [good, bad, good]


def test_refuses_the_first_dials():
    transport = FaultyTransport(MemoryTransport(), Faults(refuse=1))
    listener = transport.listen(ANYWHERE, None)
    refused = transport.dial(listener.address, None, 1)
    with pytest.raises(ChannelClosed):
        send(refused, b"hello")
    listener.accept(1).abort()
    dialled, accepted = connect(transport, listener, None)
    send(dialled, b"through")
    assert receive(accepted) == (b"through", b"")


def test_plans_are_checked():
    with pytest.raises(ConfigError):
        Faults(delay=-1)
