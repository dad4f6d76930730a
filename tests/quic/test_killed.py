"""A killed process is noticed within a second, whichever end it had; the largest bodies arrive."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from cake_core.errors import ChannelClosed
from cake_core.security import make_identity
from cake_core.transport import Address

pytest.importorskip("qh3")
PATIENCE = 20.0
PEER = """
import sys
from cake_core.security import make_identity
from cake_core.transport import Address
from cake_transport_quic.transport import QuicTransport
identity, port = make_identity(), int(sys.argv[1])
if port:
    channel = QuicTransport().dial(Address("127.0.0.1", port, "quic"), identity, 20.0)
    channel.send(b"hello")
else:
    listener = QuicTransport().listen(Address("127.0.0.1", 0, "quic"), identity)
    print(listener.address.port, flush=True)
    channel = listener.accept()
while True:
    header, body = channel.receive(lambda header, length: memoryview(bytearray(length)))
    channel.send(header, [body])
"""


def anything(header, length):
    return memoryview(bytearray(length))


@pytest.fixture
def transport():
    from cake_transport_quic.transport import QuicTransport

    return QuicTransport()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("who", ["the listener is killed", "the dialler is killed"])
def test_a_killed_peer_is_noticed_soon(transport, who):
    identity, listener = make_identity(), None
    if who == "the dialler is killed":
        listener = transport.listen(Address("127.0.0.1", 0, "quic"), identity)
    port = listener.address.port if listener else 0
    process = subprocess.Popen([sys.executable, "-c", PEER, str(port)], stdout=subprocess.PIPE, text=True)
    try:
        if listener is not None:
            channel = listener.accept(PATIENCE)
            assert channel.receive(anything, PATIENCE)[0] == b"hello"
        else:
            channel = transport.dial(Address("127.0.0.1", int(process.stdout.readline()), "quic"), identity, PATIENCE)
        channel.send(b"before", [b"body"], PATIENCE)
        assert channel.receive(anything, PATIENCE)[0] == b"before"
        process.send_signal(signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(ChannelClosed):
            channel.receive(anything, PATIENCE)
        assert time.monotonic() - began < (
            3.0 if sys.platform == "linux" else PATIENCE
        )  # a second, and room for a busy machine
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        channel.abort()
        if listener is not None:
            listener.close()


def test_a_body_of_256_mib(transport):
    identity = make_identity()
    listener = transport.listen(Address("127.0.0.1", 0, "quic"), identity)
    sender = transport.dial(listener.address, identity, PATIENCE)
    body = bytes(range(256)) * 4096 * 256
    sending = threading.Thread(target=sender.send, args=(b"large", [body]))
    sending.start()
    receiver = listener.accept(PATIENCE)
    header, received = receiver.receive(anything, PATIENCE)
    sending.join()
    assert (header, received.nbytes) == (b"large", 256 * 1024 * 1024)
    assert hashlib.sha256(received).digest() == hashlib.sha256(body).digest()
    for channel in (sender, receiver):
        channel.close()
    listener.close()
