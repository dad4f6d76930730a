"""The gate over TCP, where one thread carries every stranger: floods, drips and the messages of both ends."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
import threading
import time

import pytest
from tests.core.security_rig import KEY, OTHER, heard

from cake_core import security
from cake_core.errors import AuthenticationError, ChannelClosed
from cake_core.security.gate import Gate
from cake_core.security.strangers import Limits
from cake_core.transport import Address
from cake_transport_tcp.transport import TcpTransport

PATIENCE = 10.0
ANYWHERE = Address("127.0.0.1", 0)


def nothing(header, length):
    raise AssertionError("there is no body")


@pytest.fixture(params=["with TLS", "insecure"])
def key(request):
    return KEY if request.param == "with TLS" else None


@pytest.fixture
def gate(key):
    gate = security.listen(TcpTransport(), ANYWHERE, key, b"listener")
    yield gate
    gate.close()


def session(gate, key):
    dialled, hello = security.dial(TcpTransport(), gate.address, key, b"dialler", PATIENCE)
    accepted, said = gate.accept(PATIENCE)
    assert (hello, said) == (b"listener", b"dialler")
    return dialled, accepted


def knock(port, source="127.0.0.2"):
    """A connection from another loopback address that never says a word."""
    sock = socket.socket()
    sock.bind((source, 0))
    sock.settimeout(PATIENCE)
    sock.connect(("127.0.0.1", port))
    return sock


def flood(port, count, keep=256):
    """`count` half-open connections, the last `keep` of them at the same time."""
    held = []
    for _ in range(count):
        held.append(knock(port))
        if len(held) > keep:
            held.pop(0).close()
    return held


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=[pytest.mark.full, pytest.mark.slow])])
def test_a_flood_of_half_open_connections_keeps_nobody_out(gate, key, count):
    dialled, accepted = session(gate, key)
    before = threading.active_count()
    held = []
    flooding = threading.Thread(target=lambda: held.extend(flood(gate.address.port, count)))
    flooding.start()
    rounds = 0
    while flooding.is_alive():
        dialled.send(b"still", [b"here"], PATIENCE)
        assert accepted.receive(lambda h, n: memoryview(bytearray(n)), PATIENCE)[0] == b"still"
        rounds += 1
    flooding.join()
    started = time.monotonic()
    late = session(gate, key)
    assert time.monotonic() - started < PATIENCE
    assert rounds
    assert threading.active_count() <= before + 1
    assert len(list(gate._strangers)) <= Limits().slots_per_origin
    for end in (*held, dialled, accepted, *late):
        end.close()


def test_without_limits_the_flood_fills_the_house():
    """The mutation for the test above."""
    listener = TcpTransport().listen(ANYWHERE, None)
    gate = Gate(listener, None, b"listener", limits=Limits(slots=10**6, slots_per_origin=10**6))
    held = [knock(gate.address.port) for _ in range(20)]
    until = time.monotonic() + PATIENCE
    while len(list(gate._strangers)) < 20 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(list(gate._strangers)) > Limits().slots_per_origin
    gate.close()
    for sock in held:
        sock.close()


def test_a_drip_is_given_up_in_time(key):
    """One byte at a time never completes anything, and never gets more than its five seconds."""
    listener = TcpTransport().listen(ANYWHERE, None if key is None else security.make_identity())
    gate = Gate(listener, key, b"listener", limits=Limits(seconds=0.5))
    started = time.monotonic()
    with contextlib.closing(knock(gate.address.port)) as sock, contextlib.suppress(OSError):
        for byte in b"CAK1\0\0\0\x30" * 100:
            sock.send(bytes([byte]) if key is None else b"\x16")
            time.sleep(0.02)
        sock.recv(1)
    assert time.monotonic() - started < PATIENCE
    gate.close()


def test_a_peer_whose_bytes_come_one_by_one_gets_in(gate, key):
    """Not everybody who is slow is an enemy: a relay hands over single bytes."""
    inner = socket.socket()
    inner.bind(("127.0.0.1", 0))
    inner.listen(1)

    def relay():
        here, _ = inner.accept()
        there = socket.create_connection(("127.0.0.1", gate.address.port))
        back = threading.Thread(target=pump, args=(there, here, 65536))
        back.start()
        pump(here, there, 1)
        back.join()
        for sock in (here, there):
            sock.close()

    relaying = threading.Thread(target=relay)
    relaying.start()
    address = Address("127.0.0.1", inner.getsockname()[1])
    dialled, _ = security.dial(TcpTransport(), address, key, b"slow", PATIENCE)
    accepted, hello = gate.accept(PATIENCE)
    assert hello == b"slow"
    dialled.close()
    accepted.close()
    relaying.join(PATIENCE)
    inner.close()


def pump(source, target, most):
    with contextlib.suppress(OSError):
        target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while piece := source.recv(most):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)


def test_a_wrong_key_is_named_with_address_and_remedy_on_both_sides(caplog):
    gate = security.listen(TcpTransport(), ANYWHERE, KEY, b"listener")
    with pytest.raises(AuthenticationError, match=rf"{gate.address} did not accept our cluster key.*cake key join"):
        security.dial(TcpTransport(), gate.address, OTHER, b"dialler", PATIENCE)
    gate.close()
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert f"refused a connection to {gate.address}: 127.0.0.1:" in line
    assert "cake key show" in line


@pytest.mark.parametrize(("inside", "outside"), [(KEY, None), (None, KEY)])
def test_insecure_and_secure_never_meet_and_both_ends_say_what_to_do(inside, outside, caplog):
    gate = security.listen(TcpTransport(), ANYWHERE, inside, b"listener")
    with pytest.raises(ChannelClosed, match=rf"{gate.address}.*--insecure"):
        security.dial(TcpTransport(), gate.address, outside, b"dialler", PATIENCE)
    assert heard(caplog, "refused")
    gate.close()
    refusals = [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]
    assert len(refusals) == 1
    assert "127.0.0.1:" in refusals[0]
    assert "--insecure" in refusals[0]


def test_another_program_is_called_that(caplog):
    gate = security.listen(TcpTransport(), ANYWHERE, None, b"listener")
    with contextlib.closing(knock(gate.address.port, "127.0.0.1")) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    assert heard(caplog, "does not speak Cake's protocol")
    gate.close()


def test_running_out_of_descriptors_stops_nobody_for_good():
    gate = security.listen(TcpTransport(), ANYWHERE, None, b"listener")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 6, hard))
        with contextlib.suppress(OSError):
            while True:
                held.append(knock(gate.address.port))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for sock in held:
            sock.close()
    for end in session(gate, None):
        end.close()
    gate.close()
