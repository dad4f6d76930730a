"""The QUIC transport: `quic://host:port`. Experimental; docs/transports.md says where it helps and where it does not."""

from __future__ import annotations

import hashlib
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, TypeVar, cast

from cake_core.errors import ChannelClosed, ConfigError, DeadlineExceeded, NodeUnreachable, TransportError
from cake_core.security import make_identity
from cake_core.transport import TRANSPORT_API, Address, Identity, Listener
from cake_transport_quic import library
from cake_transport_quic.channel import QuicChannel
from cake_transport_quic.connection import Connection
from cake_transport_quic.endpoint import Endpoint

T = TypeVar("T")


class QuicTransport:
    """Channels to one address share one connection."""

    api: ClassVar[int] = TRANSPORT_API
    scheme = "quic"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._dialled: dict[tuple[Address, bool], tuple[Endpoint, Connection]] = {}

    def dial(self, address: Address, identity: Identity | None, timeout: float) -> QuicChannel:
        deadline = time.monotonic() + timeout
        with self._lock:
            shared = self._dialled.get((address, identity is not None))
        if shared is not None and shared[1].established:
            try:
                return _open(*shared, identity is not None, max(0.1, deadline - time.monotonic()))
            except ChannelClosed:
                pass  # it ended just now; a new one will do
        endpoint, connection = _connect(address, deadline)
        with self._lock:
            self._dialled[address, identity is not None] = (endpoint, connection)
        return _open(endpoint, connection, identity is not None, max(0.1, deadline - time.monotonic()))

    def listen(self, address: Address, identity: Identity | None) -> QuicListener:
        return QuicListener(address, identity)


class QuicListener(Listener):
    def __init__(self, address: Address, identity: Identity | None) -> None:
        sock = _bind(address)
        self.address = replace(address, port=sock.getsockname()[1])
        self._arrivals: queue.SimpleQueue[QuicChannel | None] = queue.SimpleQueue()
        self._closed = False
        # QUIC cannot do without a certificate, not even where nobody looks at it.
        shown = identity or make_identity()
        binding = None
        if identity is not None:
            der = ssl.PEM_cert_to_DER_cert(identity.certificate.decode("ascii"))
            binding = hashlib.sha256(der).digest()

        def welcome(quic: library.QuicConnection, where: Any) -> Connection:
            return Connection(quic, _name(where), self._endpoint.run, binding, self._arrived)

        self._endpoint = Endpoint(sock, library.listening(shown), welcome)
        self._endpoint.start()

    def accept(self, timeout: float | None = None) -> QuicChannel:
        if self._closed:
            raise ChannelClosed(f"{self.address} is closed")
        try:
            channel = self._arrivals.get(timeout=timeout)
        except queue.Empty:
            raise DeadlineExceeded(f"nobody connected to {self.address} in time") from None
        if channel is None:
            self._arrivals.put(None)  # for whoever else waits
            raise ChannelClosed(f"{self.address} is closed")
        return channel

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._endpoint.close()
            self._arrivals.put(None)

    def _arrived(self, channel: QuicChannel) -> None:
        if self._closed:
            channel.abort()
        else:
            self._arrivals.put(channel)


def _connect(address: Address, deadline: float) -> tuple[Endpoint, Connection]:
    try:
        infos = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_DGRAM)
    except OSError as error:
        text = f"cannot reach {address}: unknown name {address.host!r} ({error.strerror or error}); use its IP address"
        raise NodeUnreachable(text, address=str(address)) from error
    why = ""
    for index, (family, _, _, _, where) in enumerate(infos):
        share = max(0.1, (deadline - time.monotonic()) / (len(infos) - index))
        sock = socket.socket(family, socket.SOCK_DGRAM)
        try:
            sock.connect(where)
        except OSError as error:
            sock.close()
            why = error.strerror or str(error)
            continue
        endpoint = Endpoint(sock)
        quic = library.QuicConnection(configuration=library.dialling())
        connection = Connection(quic, str(address), endpoint.run, None)
        endpoint.add(connection)
        quic.connect(where, time.monotonic())
        endpoint.start()
        if connection.settled.wait(share) and connection.established:
            return endpoint, connection
        why = connection.failure or "no answer; is UDP let through by its firewall?"
        endpoint.run(lambda c=connection: c.fail("given up"))  # type: ignore[misc] # the loop's connection, not its last
    if "alert" in why.lower() or "protocol" in why.lower():
        raise TransportError(f"{address} does not speak Cake's protocol ({why}); check the address and the port")
    raise NodeUnreachable(f"cannot reach {address}: {why}", address=str(address))


def _open(endpoint: Endpoint, connection: Connection, encrypted: bool, timeout: float) -> QuicChannel:
    def open_channel() -> QuicChannel:
        if not connection.established:
            raise ChannelClosed(connection.failure or f"{connection.peer} is gone")
        return connection.open_channel(library.binding(connection.quic) if encrypted else None)

    return _ask(endpoint, open_channel, timeout)


def _ask(endpoint: Endpoint, call: Callable[[], T], timeout: float) -> T:
    """What `call` returns, run by the endpoint's thread."""
    answers: queue.SimpleQueue[tuple[bool, object]] = queue.SimpleQueue()

    def answer() -> None:
        try:
            answers.put((True, call()))
        except TransportError as error:
            answers.put((False, error))

    endpoint.run(answer)
    try:
        good, value = answers.get(timeout=timeout)
    except queue.Empty:
        raise ChannelClosed("the connection has just ended") from None
    if not good:
        raise cast("TransportError", value)
    return cast("T", value)


def _bind(address: Address) -> socket.socket:
    try:
        family, _, _, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, socket.SOCK_DGRAM)
        try:
            sock.bind(where)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address}: {error.strerror or error}; stop what uses UDP port {address.port}, or choose "
            "another port or an address of this machine"
        ) from error
    return sock


def _name(where: Any) -> str:
    host, port = where[0], where[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
