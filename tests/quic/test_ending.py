"""What is closed leaves nothing behind."""

from __future__ import annotations

import threading
import time

from cake_core.security import make_identity
from cake_core.transport import Address
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
