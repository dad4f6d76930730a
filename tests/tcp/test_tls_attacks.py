"""Attacks that need a real network: a man in the middle with TLS of his own, old TLS, giant lengths. As in
tests/core/test_attacks.py, each has a mutation that removes its defence and lets it through."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading

import pytest
from tests.core.security_rig import KEY

from cake_core import framing, security
from cake_core.errors import AuthenticationError, CakeError, ChannelClosed, ProtocolError
from cake_core.security import handshake
from cake_core.security.gate import Gate
from cake_core.security.strangers import Limits
from cake_core.testing.contracts.threads import Task
from cake_core.transport import Address
from cake_transport_tcp import tls
from cake_transport_tcp.transport import TcpTransport

PATIENCE = 10.0
ANYWHERE = Address("127.0.0.1", 0)


def anything(header, length):
    return memoryview(bytearray(length))


@pytest.fixture
def gate():
    listener = TcpTransport().listen(ANYWHERE, security.make_identity())
    gate = Gate(listener, KEY, b"listener", limits=Limits(seconds=2.0))
    yield gate
    gate.close()


class MiddleMan:
    """Ends the victim's TLS with his own certificate and opens his own to the listener; passes every message on."""

    def __init__(self, target):
        transport = TcpTransport()
        self._listener = transport.listen(ANYWHERE, security.make_identity())
        self.address = self._listener.address
        self._relaying = Task(lambda: self._relay(transport.dial(target, security.make_identity(), PATIENCE)))

    def _relay(self, there):
        here = self._listener.accept(PATIENCE)
        back = threading.Thread(target=self._pass_on, args=(there, here), daemon=True)
        back.start()
        self._pass_on(here, there)
        back.join(PATIENCE)

    def _pass_on(self, source, target):
        try:
            while True:
                header, body = source.receive(anything, PATIENCE)
                target.send(header, [body], PATIENCE)
        except CakeError:
            source.abort()
            target.abort()

    def close(self):
        self._listener.close()
        self._relaying.result(PATIENCE)


def man_in_the_middle(gate):
    with contextlib.closing(MiddleMan(gate.address)) as middle:
        channel = None
        try:
            channel, _ = security.dial(TcpTransport(), middle.address, KEY, b"dialler", PATIENCE)
        except AuthenticationError:
            return
        finally:
            if channel is not None:
                channel.abort()
        raise AssertionError("the victim trusts the man in the middle")


def old_tls(gate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", gate.address.port), PATIENCE) as sock, pytest.raises(ssl.SSLError):
        context.wrap_socket(sock).close()


def giant_lengths(_gate):
    """Each side of the prefix announces more than there may be; no memory may be asked for."""
    asked = []

    def allocate(header, length):
        asked.append(length)
        raise ProtocolError("over the limit of this test")

    for header, body in ((1, 2**63), (1, 2**30 + 1), (2**32 - 1, 0), (2**16 + 1, 0), (0, 5)):
        inbox = framing.Inbox()
        message = struct.pack("!4sIQ", framing.MAGIC, header, body) + b"h"
        inbox.space()[: len(message)] = message
        inbox.arrived(len(message))
        with pytest.raises(ProtocolError):
            assert inbox.next(allocate) is not None
    assert asked == []


def data_before_the_proof(gate):
    """A stranger announces a body: the gate ends the connection at once, without reading it."""
    channel = TcpTransport().dial(gate.address, security.make_identity(), PATIENCE)

    def announce():
        # The end may come while the body is still on its way.
        channel.send(handshake.MAGIC + b"\x01\x01" + bytes(32), [bytes(1 << 20)], PATIENCE)
        channel.receive(anything, PATIENCE)

    try:
        with pytest.raises(ChannelClosed):
            announce()
    finally:
        channel.abort()


def without_binding(patch):
    original = handshake.Handshake._proof

    def proof(self, role, nonces, hellos):
        self._binding = b""
        return original(self, role, nonces, hellos)

    patch.setattr(handshake.Handshake, "_proof", proof)


def any_tls(patch):
    original = tls.listening_context

    def lax(identity):
        context = original(identity)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context

    patch.setattr("cake_transport_tcp.transport.listening_context", lax)


def no_limits(patch):
    patch.setattr(framing, "MAX_HEADER", 2**20)
    patch.setattr(framing, "MAX_BODY", 2**64)


def bodies_from_strangers(patch):
    patch.setattr("cake_core.security.gate.refuse_body", anything)


CASES = [
    (man_in_the_middle, without_binding),
    (old_tls, any_tls),
    (giant_lengths, no_limits),
    (data_before_the_proof, bodies_from_strangers),
]


@pytest.mark.parametrize("attack", [attack for attack, _ in CASES])
def test_the_attack_fails(attack, gate):
    attack(gate)


@pytest.mark.parametrize(("attack", "mutation"), CASES)
def test_without_its_defence_the_attack_succeeds(attack, mutation, request, monkeypatch):
    mutation(monkeypatch)
    gate = request.getfixturevalue("gate")
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        attack(gate)
