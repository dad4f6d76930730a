"""The transport `memory`: whole messages between threads of one process, with the full contract and no network.

Every `MemoryTransport` is a network of its own: what listens on one is reached through the same object only. Bytes wait in
a bounded buffer a direction, so a slow reader holds its writer back as on a wire.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import ClassVar

from cake_core.errors import ChannelClosed, ConfigError, DeadlineExceeded, NodeUnreachable, ProtocolError, TransportError
from cake_core.model import Buffer
from cake_core.transport import MAX_BODY, MAX_HEADER, TRANSPORT_API, Address, Allocate, Channel, Identity, Listener

DEFAULT_BUFFER = 1024 * 1024
_PIECE = 256 * 1024
_PREFIX = struct.Struct("<IQ")
_FIRST_FREE_PORT = 49152


class MemoryTransport:
    """`memory://name` or `memory://name:port`; `buffer` bytes wait in each direction of a channel."""

    api: ClassVar[int] = TRANSPORT_API
    scheme = "memory"

    def __init__(self, buffer: int = DEFAULT_BUFFER) -> None:
        self._buffer = buffer
        self._lock = threading.Lock()
        self._listeners: dict[tuple[str, int], MemoryListener] = {}
        self._ports = itertools.count(_FIRST_FREE_PORT)

    def dial(self, address: Address, identity: Identity | None, timeout: float) -> Channel:
        with self._lock:
            listener = self._listeners.get((address.host, address.port))
        if listener is None:
            raise NodeUnreachable(f"nobody listens on {address}; start the worker there first", address=str(address))
        return listener.connect(identity, self._buffer)

    def listen(self, address: Address, identity: Identity | None) -> Listener:
        with self._lock:
            if address.port == 0:
                address = Address(address.host, next(self._ports), self.scheme)
            key = (address.host, address.port)
            if key in self._listeners:
                raise ConfigError(f"{address} is taken; choose another port")
            self._listeners[key] = listener = MemoryListener(self, address, identity)
        return listener

    def forget(self, address: Address) -> None:
        """A listener's own last word."""
        with self._lock:
            self._listeners.pop((address.host, address.port), None)


class MemoryListener(Listener):
    def __init__(self, transport: MemoryTransport, address: Address, identity: Identity | None) -> None:
        self.address = address
        self._transport = transport
        self._identity = identity
        self._changed = threading.Condition()
        self._waiting: deque[MemoryChannel] = deque()
        self._closed = False

    def connect(self, identity: Identity | None, buffer: int) -> Channel:
        """The dialling end of a new channel whose other end waits for `accept`."""
        if (identity is None) != (self._identity is None):
            raise TransportError(f"only one side of {self.address} encrypts; start both with the same setting")
        binding = b"plain" if self._identity is None else hashlib.sha256(self._identity.certificate).digest()
        there, back = _Pipe(buffer), _Pipe(buffer)
        accepted = MemoryChannel(there, back, binding, f"{self._transport.scheme}://dialler")
        with self._changed:
            if self._closed:
                raise NodeUnreachable(f"nobody listens on {self.address} any more", address=str(self.address))
            self._waiting.append(accepted)
            self._changed.notify()
        return MemoryChannel(back, there, binding, str(self.address))

    def accept(self, timeout: float | None = None) -> Channel:
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting or self._closed, timeout):
                raise DeadlineExceeded(f"nobody dialled {self.address} within {timeout} s")
            if self._closed:
                raise ChannelClosed(f"{self.address} is closed")
            return self._waiting.popleft()

    def close(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._transport.forget(self.address)
        for channel in self._waiting:
            channel.abort()


class MemoryChannel(Channel):
    def __init__(self, incoming: _Pipe, outgoing: _Pipe, binding: bytes, peer: str) -> None:
        self.encrypted = binding != b"plain"
        self.binding = binding
        self.peer = peer
        self._incoming = incoming
        self._outgoing = outgoing
        self._sending = threading.Lock()

    def send(self, header: bytes, buffers: Sequence[Buffer] = (), timeout: float | None = None) -> None:
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        length = sum(view.nbytes for view in views)
        _check_lengths(len(header), length)
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            if not self._sending.acquire(timeout=-1 if timeout is None else timeout):
                raise DeadlineExceeded(f"{self.peer} took no message within {timeout} s")
            try:
                for view in (memoryview(_PREFIX.pack(len(header), length)), memoryview(header), *views):
                    self._outgoing.write(view, deadline)
            finally:
                self._sending.release()
        except DeadlineExceeded:
            self.abort()
            raise

    def receive(self, allocate: Allocate, timeout: float | None = None) -> tuple[bytes, memoryview]:
        self._incoming.wait(timeout)
        try:
            prefix = bytearray(_PREFIX.size)
            self._incoming.read_into(memoryview(prefix), timeout)
            header_length, length = _PREFIX.unpack(prefix)
            _check_lengths(header_length, length)
            header = bytearray(header_length)
            self._incoming.read_into(memoryview(header), timeout)
            body = memoryview(b"")
            if length:
                body = allocate(bytes(header), length)
                if body.nbytes != length:
                    raise ProtocolError(f"a body of {length} bytes got {body.nbytes} bytes of memory")
                self._incoming.read_into(body.cast("B"), timeout)
        except BaseException:
            # Whatever interrupts a message leaves the rest of it in the pipe: nothing after it could be understood.
            self.abort()
            raise
        return bytes(header), body

    def close(self) -> None:
        self._outgoing.finish()
        self._incoming.discard()

    def abort(self) -> None:
        self._outgoing.discard()
        self._incoming.discard()


class _Pipe:
    """Bytes in one direction, at most `capacity` of them. One reader; writers are kept apart by the channel."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._changed = threading.Condition()
        self._pieces: deque[memoryview] = deque()
        self._size = 0
        self._finished = False

    def write(self, view: memoryview, deadline: float | None) -> None:
        while view.nbytes:
            with self._changed:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not self._changed.wait_for(lambda: self._size < self._capacity or self._finished, left):
                    raise DeadlineExceeded("the peer did not take all of a message in time")
                if self._finished:
                    raise ChannelClosed("the channel is closed")
                count = min(view.nbytes, self._capacity - self._size, _PIECE)
                self._pieces.append(memoryview(bytes(view[:count])))
                self._size += count
                self._changed.notify_all()
            view = view[count:]

    def wait(self, timeout: float | None) -> None:
        """Until there is something to read. Raises DeadlineExceeded after `timeout` seconds, ChannelClosed at the end."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._pieces or self._finished, timeout):
                raise DeadlineExceeded(f"no message within {timeout} s")
            if not self._pieces:
                raise ChannelClosed("the channel is closed")

    def read_into(self, view: memoryview, timeout: float | None) -> None:
        """Fills `view`; `timeout` bounds each wait for a piece, not the whole."""
        while view.nbytes:
            self.wait(timeout)
            with self._changed:
                if not self._pieces:
                    raise ChannelClosed("the channel is closed")
                piece = self._pieces.popleft()
                count = min(view.nbytes, piece.nbytes)
                view[:count] = piece[:count]
                if count < piece.nbytes:
                    self._pieces.appendleft(piece[count:])
                self._size -= count
                self._changed.notify_all()
            view = view[count:]

    def finish(self) -> None:
        """No more will be written; what is there can still be read."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def discard(self) -> None:
        """Neither written nor read any more."""
        with self._changed:
            self._finished = True
            self._pieces.clear()
            self._size = 0
            self._changed.notify_all()


def _check_lengths(header: int, body: int) -> None:
    if not 1 <= header <= MAX_HEADER:
        raise ProtocolError(f"a header has 1 to {MAX_HEADER} bytes, not {header}")
    if body > MAX_BODY:
        raise ProtocolError(f"a body has at most {MAX_BODY} bytes, not {body}")
