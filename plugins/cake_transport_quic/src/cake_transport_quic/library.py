"""Everything Cake says to its QUIC library, so that another one can take its place: this file is all that names qh3.

The connection is used without asyncio: datagrams and the time go in, datagrams, events and a timer come out.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import ssl
from dataclasses import dataclass

from qh3._hazmat import pull_quic_header
from qh3.quic.configuration import QuicConfiguration
from qh3.quic.connection import QuicConnection, QuicConnectionError
from qh3.quic.events import (
    ConnectionIdIssued,
    ConnectionIdRetired,
    ConnectionTerminated,
    HandshakeCompleted,
    StopSendingReceived,
    StreamDataReceived,
    StreamReset,
)
from qh3.quic.packet import QuicPacketType, encode_quic_version_negotiation

from cake_core.errors import TransportError
from cake_core.transport import Identity

__all__ = [
    "ConnectionIdIssued",
    "ConnectionIdRetired",
    "ConnectionTerminated",
    "HandshakeCompleted",
    "QuicConfiguration",
    "QuicConnection",
    "StopSendingReceived",
    "StreamDataReceived",
    "StreamReset",
    "arrival",
    "binding",
    "dialling",
    "listening",
    "other_version",
    "send",
    "stop",
]

IDLE = 15.0
"""Seconds of silence after which a connection is given up; core notices a frozen peer earlier."""
_ALPN = ["cake/1"]
"""The same with and without a key: where the ends differ, core's handshake says so on both of them, and QUIC would on one."""
logging.getLogger("quic").setLevel(logging.ERROR)  # its warnings are of what `Connection` tells, with the address
_SMALLEST_INITIAL = 1200


@dataclass(frozen=True, slots=True)
class Arrival:
    """What the unencrypted part of a datagram says. `initial`: it may open a connection."""

    destination: bytes
    source: bytes
    initial: bool
    version: int | None


def listening(identity: Identity) -> QuicConfiguration:
    """QUIC always encrypts, with --insecure too, where nobody authenticates."""
    configuration = QuicConfiguration(is_client=False, alpn_protocols=_ALPN, idle_timeout=IDLE)
    configuration.load_cert_chain(identity.certificate, identity.key)
    return configuration


def dialling() -> QuicConfiguration:
    configuration = QuicConfiguration(is_client=True, alpn_protocols=_ALPN, idle_timeout=IDLE)
    # Core binds the cluster key to the listener's certificate; a name in it would prove nothing.
    configuration.verify_mode = ssl.CERT_NONE
    configuration.server_name = "cake"
    return configuration


def send(connection: QuicConnection, number: int, data: bytes, last: bool = False) -> bool:
    """Whether the stream still takes it: the library knows of a peer's reset or STOP_SENDING before it has told us."""
    try:
        connection.send_stream_data(number, data, end_stream=last)
    except (ValueError, QuicConnectionError):
        return False
    return True


def stop(connection: QuicConnection, number: int) -> None:
    """Ends a stream both ways; one that is over already stays so."""
    for end in (connection.reset_stream, connection.stop_stream):
        with contextlib.suppress(ValueError, QuicConnectionError):
            end(number, 0)


def binding(connection: QuicConnection) -> bytes:
    """What ties authentication to this connection: SHA-256 of the certificate the listener has shown."""
    certificate = connection.get_peercert()
    if certificate is None:
        raise TransportError("the other end has shown no certificate")
    return hashlib.sha256(certificate.public_bytes()).digest()


def arrival(data: bytes, configuration: QuicConfiguration) -> Arrival | None:
    """None for bytes that are no QUIC packet."""
    try:
        version, kind, _, destination, source, *_ = pull_quic_header(data, 0, configuration.connection_id_length)
    except ValueError:
        return None
    initial = version is not None and QuicPacketType(kind) is QuicPacketType.INITIAL and len(data) >= _SMALLEST_INITIAL
    return Arrival(bytes(destination), bytes(source), initial, version)


def other_version(found: Arrival, configuration: QuicConfiguration) -> bytes | None:
    """The answer to a packet of a QUIC version we do not have; None if we have it."""
    if found.version is None or found.version in configuration.supported_versions:
        return None
    return encode_quic_version_negotiation(
        source_cid=found.destination, destination_cid=found.source, supported_versions=configuration.supported_versions
    )
