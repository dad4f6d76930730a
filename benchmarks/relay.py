"""A bad network in user space: relays on loopback that delay and lose, each a port in front of another port."""

from __future__ import annotations

import contextlib
import queue
import random
import socket
import threading
import time
from collections.abc import Callable

SEGMENT = 1448
LATE = 0.002
"""Seconds that a wire may make up for: a relay wakes too late, a real one sends on."""
Timed = queue.SimpleQueue[tuple[float, bytes]]


class Wire:
    """What all connections of a relay share in one direction: `rate` bytes a second. `total` counts them."""

    def __init__(self, rate: float) -> None:
        self.total = 0
        self._rate = rate
        self._free_at = 0.0
        self._lock = threading.Lock()

    def carry(self, nbytes: int) -> None:
        """Returns when the bytes have gone out."""
        with self._lock:
            self.total += nbytes
            self._free_at = max(self._free_at, time.monotonic() - LATE) + nbytes / self._rate
            due = self._free_at
        time.sleep(max(0.0, due - time.monotonic()))


def relay_shaped(port: int, rate: float) -> tuple[int, Wire, Wire]:
    """A port that leads to `port` over a wire of `rate` bytes a second each way; the wires there and back."""
    listener = socket.create_server(("127.0.0.1", 0))
    out, back = Wire(rate), Wire(rate)

    def carry(source: socket.socket, target: socket.socket, wire: Wire) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                wire.carry(len(data))
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        while True:
            here, _ = listener.accept()
            try:
                there = socket.create_connection(("127.0.0.1", port))
            except OSError:
                here.close()
                continue
            for source, target, wire in ((here, there, out), (there, here, back)):
                target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                start(lambda s=source, t=target, w=wire: carry(s, t, w))  # type: ignore[misc]

    start(accept)
    return int(listener.getsockname()[1]), out, back


def relay_tcp(port: int, delay: float, loss: float) -> int:
    """A port that leads to `port`. A lost segment costs the stream one more round trip."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            here, _ = listener.accept()
            there = socket.create_connection(("127.0.0.1", port))
            for source, target in ((here, there), (there, here)):
                target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                waiting: Timed = queue.SimpleQueue()
                start(lambda s=source, w=waiting: _take(s, w, delay, loss))  # type: ignore[misc]
                start(lambda t=target, w=waiting: _give(t.sendall, w))  # type: ignore[misc]

    start(accept)
    return int(listener.getsockname()[1])


def relay_udp(port: int, delay: float, loss: float) -> int:
    """The same for the datagrams of one dialling socket; lost ones are gone."""
    front, back = socket.socket(type=socket.SOCK_DGRAM), socket.socket(type=socket.SOCK_DGRAM)
    front.bind(("127.0.0.1", 0))
    back.connect(("127.0.0.1", port))
    peer: list[tuple[str, int]] = []
    there: Timed = queue.SimpleQueue()
    home: Timed = queue.SimpleQueue()

    def read(source: socket.socket, waiting: Timed) -> None:
        while True:
            data, where = source.recvfrom(65536)
            if source is front:
                peer[:] = [where]
            if random.random() >= loss:
                waiting.put((time.monotonic() + delay, data))

    start(lambda: read(front, there))
    start(lambda: read(back, home))
    start(lambda: _give(back.send, there))
    start(lambda: _give(lambda data: front.sendto(data, peer[0]), home))
    return int(front.getsockname()[1])


def start(target: Callable[[], None]) -> None:
    threading.Thread(target=target, daemon=True).start()


def _take(source: socket.socket, waiting: Timed, delay: float, loss: float) -> None:
    due = 0.0
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            lost = any(random.random() < loss for _ in range(-(-len(data) // SEGMENT)))
            due = max(due, time.monotonic() + delay + (2 * delay if lost else 0.0))
            waiting.put((due, data))


def _give(send: Callable[[bytes], object], waiting: Timed) -> None:
    with contextlib.suppress(OSError):
        while True:
            due, data = waiting.get()
            time.sleep(max(0.0, due - time.monotonic()))
            send(data)
