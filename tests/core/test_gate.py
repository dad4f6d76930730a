"""The gate over a transport without polling (a thread a stranger), its bookkeeping, and both ends' messages."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass

import cbor2
import pytest
from tests.core.security_rig import KEY, OTHER, heard

from cake_core import security
from cake_core.errors import AuthenticationError, ChannelClosed, DeadlineExceeded, NodeMismatch
from cake_core.security.gate import Gate
from cake_core.security.hello import PROTOCOL_VERSION, check_hello, make_hello
from cake_core.security.strangers import Complaints, Limits, Strangers, origin_of
from cake_core.testing.memory import MemoryTransport
from cake_core.transport import Address, Identity

PATIENCE = 10.0


@pytest.fixture(autouse=True)
def identity(monkeypatch):
    numbers = itertools.count()
    monkeypatch.setattr(security, "process_identity", lambda: Identity(b"certificate %d" % next(numbers), b""))


@pytest.fixture
def transport():
    return MemoryTransport()


@pytest.fixture
def gate(transport):
    gate = security.listen(transport, Address("here", 0, "memory"), KEY, b"listener")
    yield gate
    gate.close()


def test_a_peer_with_the_key_comes_through(transport, gate):
    dialled, hello = security.dial(transport, gate.address, KEY, b"dialler", PATIENCE)
    accepted, other = gate.accept(PATIENCE)
    assert (hello, other) == (b"listener", b"dialler")
    dialled.send(b"first")
    assert accepted.receive(lambda header, length: memoryview(b""), PATIENCE)[0] == b"first"
    dialled.abort()
    accepted.abort()


def test_another_key_is_refused_and_both_ends_say_so(transport, gate, caplog):
    with pytest.raises(AuthenticationError, match=r"memory://here:\d+ did not accept our cluster key.*cake key join"):
        security.dial(transport, gate.address, OTHER, b"dialler", PATIENCE)
    with pytest.raises(DeadlineExceeded):
        gate.accept(0.05)
    assert heard(caplog, "does not hold this cluster's key")
    assert "cake key show" in caplog.text


def test_a_transport_that_does_not_encrypt_gets_no_proof(transport):
    listener = transport.listen(Address("plain", 0, "memory"), None)
    channel = transport.dial(listener.address, None, PATIENCE)
    with pytest.raises(AuthenticationError, match="does not encrypt"):
        security.authenticate_dialler(channel, KEY, b"dialler", PATIENCE)
    accepted = listener.accept(PATIENCE)
    with pytest.raises(ChannelClosed):  # and nothing had been said
        accepted.receive(lambda header, length: memoryview(b""), PATIENCE)
    listener.close()


def test_insecure_mode_is_said_loudly(transport, caplog):
    security._warn_insecure.cache_clear()
    gate = security.listen(transport, Address("open", 0, "memory"), None, b"listener")
    assert "INSECURE" in caplog.text
    dialled, _ = security.dial(transport, gate.address, None, b"dialler", PATIENCE)
    accepted, _ = gate.accept(PATIENCE)
    assert (dialled.encrypted, dialled.binding) == (False, b"plain")
    dialled.abort()
    accepted.abort()
    gate.close()


def test_another_version_is_told_after_the_proof_on_both_ends(transport, caplog):
    newer = cbor2.dumps({"protocol": PROTOCOL_VERSION + 1, "cake": "9.0"})
    gate = security.listen(transport, Address("here", 0, "memory"), KEY, make_hello(), check_hello)
    security.dial(transport, gate.address, KEY, newer, PATIENCE)
    with pytest.raises(DeadlineExceeded):
        gate.accept(0.2)
    assert heard(caplog, "runs Cake 9.0")
    gate.close()
    gate = security.listen(transport, Address("there", 0, "memory"), KEY, newer)
    channel, hello = security.dial(transport, gate.address, KEY, make_hello(), PATIENCE)
    with pytest.raises(NodeMismatch, match=r"memory://there:\d+ runs Cake 9.0.*install the same version on both"):
        check_hello(hello, channel.peer)
    gate.close()


def test_no_version_is_told_without_the_proof(transport, caplog):
    gate = security.listen(transport, Address("old", 0, "memory"), KEY, make_hello("old"), check_hello)
    with pytest.raises(AuthenticationError):
        security.dial(transport, gate.address, OTHER, b"\xa1hprotocol\x18c", PATIENCE)
    gate.close()
    assert "protocol" not in caplog.text


def test_a_faulty_check_closes_the_door_to_nobody_else(transport, caplog):
    def check(hello, peer):
        if hello == b"strange":
            raise ZeroDivisionError

    gate = security.listen(transport, Address("here", 0, "memory"), KEY, b"listener", check)
    strange, _ = security.dial(transport, gate.address, KEY, b"strange", PATIENCE)
    with pytest.raises(ChannelClosed):
        strange.receive(lambda header, length: memoryview(b""), PATIENCE)
    dialled, _ = security.dial(transport, gate.address, KEY, b"usual", PATIENCE)
    assert gate.accept(PATIENCE)[1] == b"usual"
    dialled.abort()
    gate.close()


def test_a_silent_peer_is_given_up(transport):
    listener = transport.listen(Address("here", 0, "memory"), Identity(b"c", b""))
    gate = Gate(listener, KEY, b"listener", limits=Limits(seconds=0.1))
    silent = transport.dial(listener.address, Identity(b"d", b""), PATIENCE)
    with pytest.raises(ChannelClosed):
        silent.receive(lambda header, length: memoryview(b""), PATIENCE)
    gate.close()


def test_close_wakes_accept_and_ends_those_inside(transport, gate):
    dialled, _ = security.dial(transport, gate.address, KEY, b"dialler", PATIENCE)
    gate.close()
    gate.close()
    with pytest.raises(ChannelClosed):
        gate.accept(PATIENCE)
    with pytest.raises(ChannelClosed):
        dialled.receive(lambda header, length: memoryview(b""), PATIENCE)


@dataclass(eq=False)
class Stranger:
    peer: str


def come(strangers, peers, now=0.0):
    """Lets strangers enter one after another; the peers of those who had to go."""
    return [other.peer for peer in peers for other in strangers.enter(Stranger(peer), now)]


def test_the_oldest_of_an_address_goes_first():
    strangers = Strangers(Limits(slots=4, slots_per_origin=2))
    assert come(strangers, ["1.1.1.1:1", "2.2.2.2:1", "1.1.1.1:2"]) == []
    assert come(strangers, ["1.1.1.1:3", "1.1.1.1:4"]) == ["1.1.1.1:1", "1.1.1.1:2"]
    assert [other.peer for other in strangers] == ["2.2.2.2:1", "1.1.1.1:3", "1.1.1.1:4"]


def test_the_oldest_of_all_goes_when_there_is_no_slot():
    strangers = Strangers(Limits(slots=3, slots_per_origin=2))
    assert come(strangers, [f"{n}.1.1.1:1" for n in range(1, 6)]) == ["1.1.1.1:1", "2.1.1.1:1"]
    assert len(list(strangers)) == 3


def test_slots_are_freed_once_and_deadlines_are_kept():
    strangers = Strangers(Limits(seconds=5.0))
    assert strangers.next_deadline() is None
    early, late = Stranger("1.1.1.1:1"), Stranger("1.1.1.1:2")
    strangers.enter(early, 0.0)
    strangers.enter(late, 3.0)
    assert strangers.next_deadline() == 5.0
    assert strangers.overdue(4.9) == []
    assert strangers.overdue(5.0) == [early]
    assert strangers.leave(early)
    assert not strangers.leave(early)
    assert strangers.next_deadline() == 8.0


@pytest.mark.parametrize(
    ("peer", "origin"),
    [
        ("192.168.1.2:1000", "192.168.1.2"),
        ("[2001:db8:1:2:3:4:5:6]:1000", "2001:db8:1:2::/64"),
        ("[2001:db8:1:2:ffff::]:9", "2001:db8:1:2::/64"),
        ("[::ffff:10.0.0.1]:9", "10.0.0.1"),
        ("[fe80::1%eth0]:9", "fe80::/64"),
        ("memory://dialler", "memory"),
        ("somebody", "somebody"),
    ],
)
def test_whom_a_connection_counts_for(peer, origin):
    assert origin_of(peer) == origin


def test_a_flood_is_not_a_flood_of_lines(caplog):
    complaints = Complaints(most=2, seconds=60)
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            complaints.say("again", now=1.0)
        complaints.say("later", now=62.0)
    assert [record.getMessage() for record in caplog.records] == [
        "again", "again", "later (8 more like this were not logged)",
    ]  # fmt: skip


def test_who_dials_again_and_again_is_named_once_in_a_while(caplog):
    complaints = Complaints(most=10, seconds=60, again=600)
    with caplog.at_level(logging.WARNING):
        for now in range(0, 660, 30):  # as a master with the wrong key does
            complaints.say(f"wrong key at {now}", "10.0.0.2 AuthenticationError", now=float(now))
            if now == 90:
                complaints.say("wrong version", "10.0.0.2 NodeMismatch", now=float(now))
                complaints.say("another's wrong key", "10.0.0.3 AuthenticationError", now=float(now))
    assert [record.getMessage() for record in caplog.records] == [
        "wrong key at 0",
        "wrong version (3 more like this were not logged)",
        "another's wrong key",
        "wrong key at 600 (16 more like this were not logged)",
    ]


def test_a_peer_that_redials_with_a_wrong_key_is_one_line(transport, gate, caplog):
    for _ in range(5):
        with pytest.raises(AuthenticationError):
            security.dial(transport, gate.address, OTHER, b"dialler", PATIENCE)
    assert heard(caplog, "refused a connection")
    gate.close()
    assert len([record for record in caplog.records if "refused a connection" in record.getMessage()]) == 1
