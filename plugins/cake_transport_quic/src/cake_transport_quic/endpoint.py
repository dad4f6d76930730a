"""A UDP socket, the thread that owns it, and the connections over it."""

from __future__ import annotations

import contextlib
import errno
import logging
import queue
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from cake_transport_quic import library
from cake_transport_quic.connection import Connection

log = logging.getLogger(__name__)

MOST_UNPROVEN = 256
"""Connections whose QUIC handshake is under way at once; what comes above that is dropped, and comes again."""
_TURN = 64  # datagrams read before anything else gets its turn
_BUFFERS = 4 * 1024 * 1024
_TELL = ((socket.IPPROTO_IP, 11), (socket.IPPROTO_IPV6, 25)) if sys.platform == "linux" else ()
"""IP_RECVERR and IPV6_RECVERR: what comes back is told, with the address it was sent to."""

Welcome = Callable[[library.QuicConnection, Any], Connection]
"""`welcome(quic, where)` makes the connection of a peer that dialled."""


class Endpoint:
    """Runs until it is closed and its last connection is over. `configuration` and `welcome`: for one that listens."""

    def __init__(
        self, sock: socket.socket, configuration: library.QuicConfiguration | None = None, welcome: Welcome | None = None
    ) -> None:
        sock.setblocking(False)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, _BUFFERS)
        for level, option in _TELL if configuration is not None else ():
            with contextlib.suppress(OSError):
                sock.setsockopt(level, option, 1)
        self._sock = sock
        self._configuration = configuration
        self._welcome = welcome
        self._connections: list[Connection] = []
        self._by_identifier: dict[bytes, Connection] = {}
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake, self._waker = socket.socketpair()
        self._wake.setblocking(False)
        self._closing = False
        self._over = False
        self._state = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="cake-quic", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def run(self, call: Callable[[], None]) -> None:
        """Has `call` run by the endpoint's thread; from any thread. Does nothing once the endpoint is over."""
        with self._state:
            if self._over:
                return
            self._calls.put(call)
            with contextlib.suppress(BlockingIOError):
                self._waker.send(b"\0")

    def add(self, connection: Connection) -> None:
        """Before `start`, or by the endpoint's thread."""
        self._connections.append(connection)

    def close(self) -> None:
        """No new connections from this moment; the endpoint ends with the last it has. From any thread."""
        self._closing = True
        self.run(self._leave)

    def _leave(self) -> None:
        for connection in self._connections:
            connection.leave()

    def _serve(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._sock, selectors.EVENT_READ)
                selector.register(self._wake, selectors.EVENT_READ)
                self._turn()
                while not self._closing or self._connections:
                    # Never before looking whether it is over: without connections nothing would end the wait.
                    selector.select(self._timeout())
                    self._turn()
        except Exception:
            log.exception("a QUIC endpoint failed")
        with self._state:
            self._over = True
        for connection in self._connections:
            connection.fail(f"the connection to {connection.peer} is gone")
        for sock in (self._sock, self._wake, self._waker):
            sock.close()

    def _timeout(self) -> float | None:
        now = time.monotonic()
        times = [connection.wake_at(now) for connection in self._connections]
        times += [timer for c in self._connections if (timer := c.quic.get_timer()) is not None]
        return max(0.0, min(times) - now) if times else None

    def _turn(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while len(self._wake.recv(4096)) == 4096:
                pass
        self._read()
        while not self._calls.empty():
            self._calls.get()()
        now = time.monotonic()
        for connection in list(self._connections):
            self._drive(connection, now)
            for identifier in connection.identifiers:
                self._by_identifier[identifier] = connection
            if connection.failure:
                self._remove(connection)

    def _drive(self, connection: Connection, now: float) -> None:
        try:
            timer = connection.quic.get_timer()
            if timer is not None and timer <= now:
                connection.quic.handle_timer(now)
            connection.advance(now)
            self._send(connection, now)
        except Exception as error:  # a defect that one connection meets is not the end of the others
            log.exception("the QUIC connection to %s failed", connection.peer)
            connection.fail(f"lost {connection.peer}: {type(error).__name__}: {error}")

    def _read(self) -> None:
        for _ in range(_TURN):
            try:
                data, where = self._sock.recvfrom(65536)
            except BlockingIOError:
                return
            except OSError as error:
                self._refused(error)
                return
            connection = self._route(data, where)
            if connection is not None:
                connection.heard()
                connection.quic.receive_datagram(data, where, time.monotonic())

    def _route(self, data: bytes, where: Any) -> Connection | None:
        if self._configuration is None or self._welcome is None:
            return self._connections[0] if self._connections else None
        found = library.arrival(data, self._configuration)
        if found is None:
            return None
        connection = self._by_identifier.get(found.destination)
        if connection is not None or not found.initial or self._closing:
            return connection
        refusal = library.other_version(found, self._configuration)
        if refusal is not None:
            self._sock.sendto(refusal, where)
            return None
        if sum(not c.established for c in self._connections) >= MOST_UNPROVEN:
            return None
        quic = library.QuicConnection(configuration=self._configuration, original_destination_connection_id=found.destination)
        connection = self._welcome(quic, where)
        connection.identifiers.add(found.destination)
        self._by_identifier[found.destination] = connection
        self.add(connection)
        return connection

    def _send(self, connection: Connection, now: float) -> None:
        for data, where in connection.quic.datagrams_to_send(now):
            connection.where = where
            try:
                if self._configuration is None:
                    self._sock.send(data)
                else:
                    self._sock.sendto(data, where)
            except BlockingIOError:
                return  # lost, as on any network; QUIC sends it again
            except OSError as error:
                self._refused(error)  # perhaps about another packet, and another connection's

    def _refused(self, error: OSError) -> None:
        """Learns from the system that nobody listens at a port any more."""
        if self._configuration is None:
            gone = self._connections if isinstance(error, ConnectionRefusedError) else []
        else:
            unreachable = set(_returned(self._sock))
            gone = [connection for connection in self._connections if connection.where in unreachable]
        for connection in list(gone):
            connection.refused()

    def _remove(self, connection: Connection) -> None:
        self._connections.remove(connection)
        self._by_identifier = {i: c for i, c in self._by_identifier.items() if c is not connection}
        if self._configuration is None:
            self._closing = True


def _returned(sock: socket.socket) -> Iterator[object]:
    """Where packets of a socket that is not connected came back from, as Linux tells with `_TELL`."""
    while _TELL:
        try:
            _, ancillary, _, where = sock.recvmsg(1, 512, socket.MSG_ERRQUEUE)
        except OSError:
            return
        if any(int.from_bytes(data[:4], sys.byteorder) == errno.ECONNREFUSED for _, _, data in ancillary):
            yield where
