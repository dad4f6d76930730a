"""A channel over one QUIC stream.

The stream carries records: a length (u32) and so many bytes of messages, or the length `CREDIT` and how many bytes the
reader has taken so far (u64). A writer is at most `WINDOW` bytes ahead of the reader's taking. QUIC's own flow control
follows what has arrived, not what was taken, so without this a slow reader would have to keep everything.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from cake_core.errors import ChannelClosed, DeadlineExceeded, ProtocolError
from cake_core.framing import Inbox, frame
from cake_core.model import Buffer
from cake_core.transport import Allocate, Channel

WINDOW = 4 * 1024 * 1024
CREDIT = 0xFFFFFFFF
_PIECE = 256 * 1024
_LENGTH = struct.Struct("!I")
_TAKEN = struct.Struct("!IQ")

Post = Callable[[bytes, str], None]
"""`post(data, end)` hands bytes to the connection's thread, and ends the stream: "" not, "finish" in order, "reset"."""


class QuicChannel(Channel):
    """The blocking half. `arrived`, `finished` and `lost` are called by the connection's thread and never block."""

    def __init__(self, post: Post, peer: str, binding: bytes | None) -> None:
        self.encrypted = binding is not None
        self.binding = b"plain" if binding is None else binding
        self.peer = peer
        self._post = post
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._inbox = Inbox()
        self._unread: deque[memoryview] = deque()
        self._raw = bytearray()
        self._sent = 0  # bytes of messages, and how many of them the peer has taken
        self._taken = 0
        self._arrived = 0
        self._read = 0  # bytes we have taken, and how many we have told
        self._told = 0
        self._over = ""  # why nothing more can be sent
        self._ended = ""  # why nothing more can be received, once what has arrived is read
        self._closed = False

    def send(self, header: bytes, buffers: Sequence[Buffer] = (), timeout: float | None = None) -> None:
        pieces = frame(header, buffers)
        self._take_turn(timeout)
        try:
            for piece in pieces:
                self._write(piece, timeout)
        except DeadlineExceeded:
            self.abort()
            raise
        finally:
            self._sending.release()

    def receive(self, allocate: Allocate, timeout: float | None = None) -> tuple[bytes, memoryview]:
        try:
            return self._receive(allocate, timeout)
        except DeadlineExceeded:
            if self._inbox.begun:
                self.abort()
            raise
        except ProtocolError as error:
            self.abort()
            raise ProtocolError(f"{self.peer}: {error}") from error
        except BaseException:
            self.abort()
            raise

    def close(self) -> None:
        self._end("finish")

    def abort(self) -> None:
        self._end("reset")

    # Called by the connection's thread

    def arrived(self, data: bytes) -> None:
        """Bytes of the stream. Raises ProtocolError for a peer that does not keep to the window."""
        self._raw += data
        start = 0
        while len(self._raw) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._raw, start)
            size = _TAKEN.size if length == CREDIT else _LENGTH.size + length
            if length != CREDIT and length > WINDOW:
                raise ProtocolError("a record larger than the window")
            if len(self._raw) - start < size:
                break
            if length == CREDIT:
                self._credited(_TAKEN.unpack_from(self._raw, start)[1])
            else:
                self._delivered(bytes(self._raw[start + _LENGTH.size : start + size]))
            start += size
        del self._raw[:start]

    def finished(self, reason: str) -> None:
        """The peer has ended its side in order."""
        with self._changed:
            self._over = self._over or reason
            self._ended = self._ended or reason
            self._changed.notify_all()

    def lost(self, reason: str) -> None:
        """The stream or the connection is gone; what has not been read will not be."""
        with self._changed:
            self._over = self._over or reason
            self._ended = self._ended or reason
            self._unread.clear()
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """Whether this end has been closed or aborted."""
        return self._closed

    # Inside

    def _delivered(self, data: bytes) -> None:
        with self._changed:
            self._arrived += len(data)
            if self._arrived - self._read > WINDOW and not self._closed:
                raise ProtocolError("more than the window")
            if not self._closed:
                self._unread.append(memoryview(data))
                self._changed.notify_all()

    def _credited(self, taken: int) -> None:
        with self._changed:
            if not self._taken <= taken <= self._sent:
                raise ProtocolError("it says it took what was never sent")
            self._taken = taken
            self._changed.notify_all()

    def _take_turn(self, timeout: float | None) -> None:
        """Waits for other senders as long as they get on."""
        while True:
            sent = self._sent
            if self._sending.acquire(timeout=-1 if timeout is None else timeout):
                return
            if self._sent == sent:
                self.abort()
                raise DeadlineExceeded(f"{self.peer} did not read in time")

    def _write(self, piece: memoryview, timeout: float | None) -> None:
        while piece.nbytes:
            with self._changed:
                if not self._changed.wait_for(lambda: self._over or self._sent - self._taken < WINDOW, timeout):
                    raise DeadlineExceeded(f"{self.peer} did not read in time")
                if self._over:
                    raise ChannelClosed(self._over)
                count = min(piece.nbytes, WINDOW - (self._sent - self._taken), _PIECE)
                self._sent += count
            self._post(_LENGTH.pack(count) + piece[:count], "")
            piece = piece[count:]

    def _receive(self, allocate: Allocate, timeout: float | None) -> tuple[bytes, memoryview]:
        if self._closed:
            raise ChannelClosed(self._over)
        deadline = None if timeout is None else time.monotonic() + timeout
        while (message := self._inbox.next(allocate)) is None:
            if timeout is not None and self._inbox.in_body:
                deadline = time.monotonic() + timeout
            self._inbox.arrived(self._fetch(self._inbox.space(), deadline))
        return message

    def _fetch(self, into: memoryview, deadline: float | None) -> int:
        with self._changed:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._changed.wait_for(lambda: self._unread or self._ended, left):
                raise DeadlineExceeded(f"{self.peer} did not answer in time")
            if self._closed or not self._unread:
                raise ChannelClosed(self._ended)
            piece = self._unread.popleft()
            count = min(piece.nbytes, into.nbytes)
            if count < piece.nbytes:
                self._unread.appendleft(piece[count:])
            self._read += count
            tell = self._read - self._told >= WINDOW // 4
            if tell:
                self._told = self._read
        into[:count] = piece[:count]
        if tell:
            self._post(_TAKEN.pack(CREDIT, self._told), "")
        return count

    def _end(self, how: str) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
            reason = f"the connection to {self.peer} was closed here"
            self._over = self._over or reason
            self._ended = self._ended or reason
            self._unread.clear()
            self._changed.notify_all()
        self._post(b"", how)
