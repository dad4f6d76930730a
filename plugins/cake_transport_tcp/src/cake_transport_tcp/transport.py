"""The TCP transport: `tcp://host:port`."""

from __future__ import annotations

import socket
from typing import ClassVar

from cake_core.errors import TransportError
from cake_core.transport import TRANSPORT_API, Address, Identity
from cake_transport_tcp.channel import TcpChannel
from cake_transport_tcp.listener import TcpListener
from cake_transport_tcp.sockets import Timers, connect, tune
from cake_transport_tcp.wire import Wire


class TcpTransport:
    api: ClassVar[int] = TRANSPORT_API

    def __init__(self, timers: Timers | None = None, scheme: str = "tcp") -> None:
        self.scheme = scheme
        self._timers = timers or Timers()

    def dial(self, address: Address, identity: Identity | None, timeout: float) -> TcpChannel:
        if identity is not None:
            raise TransportError("this build of the TCP transport does not encrypt yet; use --insecure")
        sock = connect(address, timeout)
        return self._channel(sock, str(address))

    def listen(self, address: Address, identity: Identity | None) -> TcpListener:
        if identity is not None:
            raise TransportError("this build of the TCP transport does not encrypt yet; use --insecure")
        return TcpListener(address, self._channel)

    def _channel(self, sock: socket.socket, peer: str) -> TcpChannel:
        tune(sock, self._timers)
        return TcpChannel(Wire(sock, peer), peer)
