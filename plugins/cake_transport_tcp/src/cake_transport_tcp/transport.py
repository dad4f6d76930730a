"""The TCP transport: `tcp://host:port`."""

from __future__ import annotations

import socket
import ssl
import time
from typing import ClassVar

from cake_core.errors import ChannelClosed, TransportError
from cake_core.transport import TRANSPORT_API, Address, Identity
from cake_transport_tcp.channel import TcpChannel
from cake_transport_tcp.listener import TcpListener
from cake_transport_tcp.sockets import Timers, connect, tune
from cake_transport_tcp.tls import TlsStream, binding_of, dialling_context, listening_context
from cake_transport_tcp.wire import Wire


class TcpTransport:
    api: ClassVar[int] = TRANSPORT_API

    def __init__(self, timers: Timers | None = None, scheme: str = "tcp") -> None:
        self.scheme = scheme
        self._timers = timers or Timers()

    def dial(self, address: Address, identity: Identity | None, timeout: float) -> TcpChannel:
        deadline = time.monotonic() + timeout
        sock = connect(address, timeout)
        tune(sock, self._timers)
        wire = Wire(sock, str(address))
        if identity is None:
            return TcpChannel(wire, wire.peer)
        # The listener's certificate is what counts; the dialler shows none, and proves itself in core's handshake.
        stream = TlsStream(wire, dialling_context(), listens=False)
        try:
            stream.handshake(deadline)
            return TcpChannel(stream, wire.peer, binding_of(stream.peer_certificate()))
        except ChannelClosed as error:
            wire.abort()
            raise ChannelClosed(f"{error}; if it runs with --insecure, start both ends alike") from error
        except TransportError:
            wire.abort()
            raise

    def listen(self, address: Address, identity: Identity | None) -> TcpListener:
        if identity is None:
            return TcpListener(address, self._plain)
        context = listening_context(identity)
        binding = binding_of(ssl.PEM_cert_to_DER_cert(identity.certificate.decode("ascii")))

        def welcome(sock: socket.socket, peer: str) -> TcpChannel:
            return TcpChannel(TlsStream(self._wire(sock, peer), context, listens=True), peer, binding)

        return TcpListener(address, welcome)

    def _plain(self, sock: socket.socket, peer: str) -> TcpChannel:
        return TcpChannel(self._wire(sock, peer), peer)

    def _wire(self, sock: socket.socket, peer: str) -> Wire:
        try:
            tune(sock, self._timers)
            return Wire(sock, peer)
        except OSError:
            sock.close()
            raise
