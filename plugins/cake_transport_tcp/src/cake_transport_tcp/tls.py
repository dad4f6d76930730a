"""TLS 1.3 on a wire, and the contexts for it.

A lock protects the TLS object, which two threads must never use at once (reading and writing one `SSLSocket` from two
threads is a crash in CPython); waiting for the network happens outside it, so a slow reader never keeps a writer out.
Nobody's certificate is verified here: the handshake of core binds the cluster key to the listener's certificate.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import cast

from cake_core.errors import ChannelClosed, ConfigError, DeadlineExceeded, ProtocolError, TransportError
from cake_core.transport import Identity
from cake_transport_tcp.wire import Wire

ALPN = "cake/1"
_CHUNK = 256 * 1024  # encrypted at once; also up to which a message's pieces are joined, to be one packet
_READ = 64 * 1024


def listening_context(identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # A resumed session would have no certificate of its own to be bound to.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    context.set_alpn_protocols([ALPN])
    try:
        with _as_file(identity.certificate + identity.key) as path:
            context.load_cert_chain(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot use this process' certificate: {error}") from error
    return context


def dialling_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([ALPN])
    return context


def binding_of(certificate: bytes) -> bytes:
    """What both ends know of a listener's certificate (DER)."""
    return hashlib.sha256(certificate).digest()


class TlsStream:
    """A stream (see `wire.Stream`). The TLS handshake happens in the first use, or in `handshake`."""

    def __init__(self, wire: Wire, context: ssl.SSLContext, listens: bool) -> None:
        self._wire = wire
        self._arriving, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arriving, self._leaving, server_side=listens)
        self._lock = threading.Lock()  # the TLS object and its buffers
        self._order = threading.Lock()  # records go out in the order in which they were encrypted
        self._shaking = threading.Lock()
        self._ready = False
        self._raw = memoryview(bytearray(_READ))

    @property
    def written(self) -> int:
        return self._wire.written

    def fileno(self) -> int:
        return self._wire.fileno()

    def handshake(self, deadline: float | None) -> None:
        """Goes on with the handshake until it is done. After DeadlineExceeded it can be gone on with."""
        if self._ready:
            return
        left = -1.0 if deadline is None else max(0.0, deadline - time.monotonic())
        if not self._shaking.acquire(timeout=left):
            raise DeadlineExceeded(f"{self._wire.peer} did not finish the encryption handshake in time")
        try:
            while not self._ready:
                self._shake(deadline)
        finally:
            self._shaking.release()

    def peer_certificate(self) -> bytes:
        """DER, after the handshake; raises TransportError if the other end agreed to none of our protocols."""
        with self._lock:
            certificate, protocol = self._tls.getpeercert(binary_form=True), self._tls.selected_alpn_protocol()
        if certificate is None or protocol != ALPN:
            raise TransportError(f"{self._wire.peer} encrypts but does not speak Cake; is the port right?")
        return certificate

    def read(self, into: memoryview, deadline: float | None) -> int:
        self.handshake(deadline)
        while True:
            count = self._decrypt(into)
            if count is not None:
                return count
            if not self._fetch(deadline):
                return 0

    def write(self, pieces: Sequence[memoryview], patience: float | None) -> None:
        self.handshake(None if patience is None else time.monotonic() + patience)
        with self._order:
            for chunk in _chunks(pieces):
                self._wire.write([memoryview(self._encrypt(chunk))], patience)

    def finish(self) -> None:
        if self._ready and self._order.acquire(blocking=False):
            try:
                with self._lock, contextlib.suppress(ssl.SSLError):
                    self._tls.unwrap()
                with self._lock:
                    data = self._leaving.read()
                with contextlib.suppress(TransportError):
                    self._wire.write([memoryview(data)], 0.0)
            finally:
                self._order.release()
        self._wire.finish()

    def abort(self) -> None:
        self._wire.abort()

    def _shake(self, deadline: float | None) -> None:
        failed: ssl.SSLError | None = None
        with self._lock:
            try:
                self._tls.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                done = False
            except ssl.SSLError as error:
                done, failed = False, error
            data = self._leaving.read()  # of a failed handshake: the alert
        if data:
            self._wire.write([memoryview(data)], None if deadline is None else max(1.0, deadline - time.monotonic()))
        if failed is not None:
            raise ProtocolError(
                f"the encryption handshake with {self._wire.peer} failed ({failed.reason or failed}); start both ends with "
                "the cluster key or both with --insecure"
            ) from failed
        if not done and not self._fetch(deadline):
            raise ChannelClosed(f"{self._wire.peer} closed the connection during the encryption handshake")
        self._ready = done

    def _fetch(self, deadline: float | None) -> int:
        count = self._wire.read(self._raw, deadline)
        with self._lock:
            self._arriving.write(self._raw[:count])
        return count

    def _encrypt(self, chunk: bytes | memoryview) -> bytes:
        with self._lock:
            try:
                self._tls.write(chunk)
            except ssl.SSLError as error:  # one side has said that it is over
                raise ChannelClosed(f"the connection to {self._wire.peer} was closed") from error
            return self._leaving.read()

    def _decrypt(self, into: memoryview) -> int | None:
        """Fills `into` as far as what has arrived allows; None if not one byte, 0 at the peer's end."""
        filled = 0
        with self._lock:
            try:
                # Asking for what has not arrived would cost an exception, twice a message.
                while filled < into.nbytes and (self._arriving.pending or self._tls.pending()):
                    # One record at most. With a buffer this returns a count, which its type does not say.
                    count = cast("int", self._tls.read(into.nbytes - filled, into[filled:]))
                    if not count:
                        return filled
                    filled += count
                return filled or None
            except ssl.SSLWantReadError:
                return filled or None
            except ssl.SSLZeroReturnError:
                return filled
            except ssl.SSLError as error:
                raise ProtocolError(f"what {self._wire.peer} sent was changed on the way ({error.reason})") from error


def _chunks(pieces: Sequence[memoryview]) -> Iterator[bytes | memoryview]:
    if len(pieces) > 1 and sum(piece.nbytes for piece in pieces) <= _CHUNK:
        yield b"".join(pieces)
        return
    for piece in pieces:
        for start in range(0, piece.nbytes, _CHUNK):
            yield piece[start : start + _CHUNK]


@contextlib.contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """A path under which `content` can be read: OpenSSL takes a key from nowhere else. In memory where the system can."""
    if hasattr(os, "memfd_create"):
        number = os.memfd_create("cake")
        try:
            os.write(number, content)
            yield f"/proc/self/fd/{number}"
        finally:
            os.close(number)
        return
    number, path = tempfile.mkstemp()  # only the owner may read it
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content)
        yield path
    finally:
        os.unlink(path)
