"""What becomes of a channel when the other process is killed, stopped, or cut off: over real processes."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from cake_core.errors import ChannelClosed, ConfigError, DeadlineExceeded, NodeUnreachable
from cake_core.security import make_identity
from cake_core.transport import Address
from cake_transport_tcp import sockets
from cake_transport_tcp.sockets import Timers
from cake_transport_tcp.transport import TcpTransport

PATIENCE = 10.0
ECHO = """
from cake_core.transport import Address
from cake_core.security import make_identity
from cake_transport_tcp.transport import TcpTransport
import sys
listener = TcpTransport().listen(Address("127.0.0.1", 0), make_identity() if sys.argv[1] == "tls" else None)
print(listener.address.port, flush=True)
channel = listener.accept()
while True:
    header, body = channel.receive(lambda header, length: memoryview(bytearray(length)))
    channel.send(header, [body])
"""


def anything(header, length):
    return memoryview(bytearray(length))


@pytest.fixture(params=["plain", "tls"])
def peer(request):
    """A channel to an echoing process, and the process."""
    process = subprocess.Popen([sys.executable, "-c", ECHO, request.param], stdout=subprocess.PIPE, text=True)
    try:
        port = int(process.stdout.readline())
        identity = make_identity() if request.param == "tls" else None
        channel = TcpTransport().dial(Address("127.0.0.1", port), identity, PATIENCE)
        channel.send(b"hello", [b"body"], PATIENCE)
        assert channel.receive(anything, PATIENCE)[0] == b"hello"
        yield channel, process
        channel.abort()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_peer_is_noticed_at_once(peer):
    channel, process = peer
    started = time.monotonic()
    process.kill()
    with pytest.raises(ChannelClosed):
        channel.receive(anything, PATIENCE)
    assert time.monotonic() - started < 3.0


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_stopped_peer_is_noticed_by_whoever_waits_for_it(peer):
    channel, process = peer
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(DeadlineExceeded):
        channel.receive(anything, 0.2)
    with pytest.raises(DeadlineExceeded):  # after what the system's buffers take
        channel.send(b"h", [bytes(1 << 20)] * 256, 0.2)
    with pytest.raises(ChannelClosed):
        channel.receive(anything, 0.2)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_peer_that_goes_on_loses_nothing(peer):
    channel, process = peer
    process.send_signal(signal.SIGSTOP)
    channel.send(b"while stopped", [b"body"], PATIENCE)
    with pytest.raises(DeadlineExceeded):
        channel.receive(anything, 0.1)
    process.send_signal(signal.SIGCONT)
    header, body = channel.receive(anything, PATIENCE)
    assert (header, bytes(body)) == (b"while stopped", b"body")


def test_a_slow_but_steady_reader_is_no_dead_one():
    """The timeout of a send counts from the last byte the peer took, not from the first."""
    listener = TcpTransport().listen(Address("127.0.0.1", 0), None)
    with socket.create_connection(("127.0.0.1", listener.address.port)) as reader:
        channel = listener.accept(PATIENCE)
        size, total, seen = 64 << 20, 0, []
        sending = threading.Thread(target=lambda: seen.append(channel.send(b"h", [bytes(size)], 1.0)))
        sending.start()
        started = time.monotonic()
        while total < size + 17:
            total += len(reader.recv(1 << 20))
            if time.monotonic() - started < 2.5:
                time.sleep(0.1)
        sending.join(PATIENCE)
        assert seen == [None]
        channel.abort()
    listener.close()


def test_the_system_is_told_when_to_give_up():
    listener = TcpTransport().listen(Address("127.0.0.1", 0), None)
    channel = TcpTransport(Timers(idle=7, interval=3, probes=5, unacknowledged=11)).dial(listener.address, None, PATIENCE)
    sock = socket.socket(fileno=channel.fileno())
    try:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        wanted = {"TCP_KEEPIDLE": 7, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 5, "TCP_USER_TIMEOUT": 11_000}
        for name, value in wanted.items():
            if hasattr(socket, name):
                assert sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value
    finally:
        sock.detach()
        channel.abort()
        listener.close()


def test_a_system_without_these_options_will_do(monkeypatch):
    for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT"):
        monkeypatch.delattr(socket, name, raising=False)
    listener = TcpTransport().listen(Address("127.0.0.1", 0), None)
    TcpTransport().dial(listener.address, None, PATIENCE).abort()
    listener.close()


def test_the_first_of_several_addresses_may_be_dead(monkeypatch):
    listener = TcpTransport().listen(Address("127.0.0.1", 0), None)
    port = listener.address.port
    found = [(socket.AF_INET6, ("::1", port, 0, 0)), (socket.AF_INET, ("127.0.0.1", port))]
    monkeypatch.setattr(sockets, "_resolve", lambda address, timeout: found)
    channel = TcpTransport().dial(Address("two.example", port), None, PATIENCE)
    assert channel.peer == f"tcp://two.example:{port}"
    channel.abort()
    listener.close()


def test_a_name_that_listens_has_all_its_addresses(monkeypatch):
    both = [(socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET, ("127.0.0.2", 0))]
    monkeypatch.setattr(sockets, "_lookup", lambda host, port, flags=0: both)
    listener = TcpTransport().listen(Address("two.example", 0), None)
    monkeypatch.undo()
    for host in ("127.0.0.1", "127.0.0.2"):
        TcpTransport().dial(Address(host, listener.address.port), None, PATIENCE).abort()
        listener.accept(PATIENCE).abort()
    listener.close()


def test_the_any_address_serves_both_families():
    listener = TcpTransport().listen(Address("::", 0), None)
    for host in ("127.0.0.1", "::1"):
        TcpTransport().dial(Address(host, listener.address.port), None, PATIENCE).abort()
        channel = listener.accept(PATIENCE)
        assert channel.peer.startswith("127.0.0.1:" if host == "127.0.0.1" else "[::1]:")
        channel.abort()
    listener.close()


def test_what_cannot_be_reached_is_named_with_the_reason(monkeypatch):
    with contextlib.closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(NodeUnreachable, match=rf"tcp://127.0.0.1:{port}: connection refused; start the worker"):
            TcpTransport().dial(Address("127.0.0.1", port), None, PATIENCE)
    monkeypatch.setattr(sockets, "_lookup", lambda *given: (_ for _ in ()).throw(socket.gaierror(-2, "unknown")))
    with pytest.raises(NodeUnreachable, match=r"unknown name 'nowhere.example'.*use its IP address"):
        TcpTransport().dial(Address("nowhere.example", 1), None, PATIENCE)


def test_a_silent_name_server_does_not_hold_us_up(monkeypatch):
    def slow(host, port, flags=0):
        if flags:
            raise socket.gaierror(-2, "not numeric")
        time.sleep(2.0)
        return []

    monkeypatch.setattr(sockets, "_lookup", slow)
    started = time.monotonic()
    with pytest.raises(NodeUnreachable, match="not resolved in time"):
        TcpTransport().dial(Address("slow.example", 1), None, 0.1)
    assert time.monotonic() - started < 1.9


@pytest.mark.parametrize(
    ("address", "remedy"),
    [(Address("203.0.113.1", 0), "0.0.0.0 for all"), (Address("no such name", 0), "an address of this machine")],
)
def test_an_address_that_cannot_be_had_is_a_message(address, remedy):
    with pytest.raises(ConfigError, match=remedy):
        TcpTransport().listen(address, None)
