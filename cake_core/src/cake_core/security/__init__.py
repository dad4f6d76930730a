"""Secure connections: a process' identity for TLS, dialling a peer that must hold the cluster key.

Encryption is the transport's, authentication is `handshake`'s, the listening end is `gate`'s.
"""

from __future__ import annotations

import datetime
import functools
import logging
import time

from cake_core.errors import ConfigError
from cake_core.security.gate import Check, Gate
from cake_core.security.handshake import authenticate_dialler, authenticate_listener
from cake_core.security.keys import ClusterKey, find_key, obtain_key
from cake_core.transport import Address, Channel, Identity, Transport

__all__ = [
    "ClusterKey",
    "Gate",
    "authenticate_dialler",
    "authenticate_listener",
    "dial",
    "find_key",
    "listen",
    "make_identity",
    "obtain_key",
]

log = logging.getLogger(__name__)


def dial(transport: Transport, address: Address, key: ClusterKey | None, hello: bytes, timeout: float) -> tuple[Channel, bytes]:
    """A channel to a peer that has proved to hold the key, and its hello. `key` None is insecure mode: no proof, no TLS.

    Raises NodeUnreachable (nobody answers), AuthenticationError (permanent: another key, or one end insecure),
    ChannelClosed, DeadlineExceeded, ProtocolError, each naming the address.
    """
    if key is None:
        _warn_insecure()
    deadline = time.monotonic() + timeout
    channel = transport.dial(address, None if key is None else process_identity(), timeout)
    return channel, authenticate_dialler(channel, key, hello, max(0.0, deadline - time.monotonic()))


def listen(transport: Transport, address: Address, key: ClusterKey | None, hello: bytes, check: Check | None = None) -> Gate:
    """A gate at an address: `accept` returns only peers that have proved to hold the key. Raises ConfigError."""
    if key is None:
        _warn_insecure()
    return Gate(transport.listen(address, None if key is None else process_identity()), key, hello, check)


def make_identity() -> Identity:
    """A new self-signed certificate. Nobody checks its names or dates: the handshake binds itself to its hash."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise ConfigError("encryption needs the package cryptography: `pip install cryptography`, or use --insecure") from error
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "cake")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=3650))
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Identity(certificate.public_bytes(serialization.Encoding.PEM), private)


@functools.cache
def process_identity() -> Identity:
    """This process' identity, made when first needed, never written anywhere."""
    return make_identity()


@functools.cache
def _warn_insecure() -> None:
    log.warning(
        "INSECURE: no key and no encryption. Anyone on the network can read this cluster's data and use its workers. "
        "Leave --insecure out to be safe."
    )
