"""A channel over one TCP connection."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from cake_core.errors import ChannelClosed, DeadlineExceeded, ProtocolError
from cake_core.framing import Inbox, frame
from cake_core.model import Buffer
from cake_core.transport import Allocate, PollingChannel
from cake_transport_tcp.wire import Stream


class TcpChannel(PollingChannel):
    """Frames on a stream. While a body arrives, `timeout` counts from its last byte: a large one may take its time, a
    header may not."""

    def __init__(self, stream: Stream, peer: str, binding: bytes | None = None) -> None:
        self.encrypted = binding is not None
        self.binding = b"plain" if binding is None else binding
        self.peer = peer
        self._stream = stream
        self._inbox = Inbox()
        self._sending = threading.Lock()
        self._over = False

    def send(self, header: bytes, buffers: Sequence[Buffer] = (), timeout: float | None = None) -> None:
        pieces = frame(header, buffers)
        if not self._sending.acquire(blocking=False):
            self._take_turn(timeout)
        try:
            self._stream.write(pieces, timeout)
        except DeadlineExceeded:
            self.abort()
            raise
        finally:
            self._sending.release()

    def _take_turn(self, timeout: float | None) -> None:
        """Waits for other senders as long as they get on."""
        while True:
            written = self._stream.written
            if self._sending.acquire(timeout=-1 if timeout is None else timeout):
                return
            if self._stream.written == written:
                self.abort()
                raise DeadlineExceeded(f"{self.peer} did not read in time")

    def receive(self, allocate: Allocate, timeout: float | None = None) -> tuple[bytes, memoryview]:
        try:
            return self._advance(allocate, timeout)
        except DeadlineExceeded:
            if self._inbox.begun:
                self.abort()
            raise

    def _advance(self, allocate: Allocate, timeout: float | None) -> tuple[bytes, memoryview]:
        inbox = self._inbox
        try:
            if self._over:  # what had arrived before the end is not worth having
                raise ChannelClosed(f"the connection to {self.peer} was closed here")
            deadline = None if timeout is None else time.monotonic() + timeout
            while (message := inbox.next(allocate)) is None:
                if timeout is not None and inbox.in_body:
                    deadline = time.monotonic() + timeout
                count = self._stream.read(inbox.space(), deadline)
                if not count:
                    where = " in the middle of a message" if inbox.begun else ""
                    raise ChannelClosed(f"{self.peer} closed the connection{where}")
                inbox.arrived(count)
            return message
        except DeadlineExceeded:
            raise
        except ProtocolError as error:
            self.abort()
            raise ProtocolError(f"{self.peer}: {error}") from error
        except BaseException:
            # Also what a faulty `allocate` raises: the rest of its message would be read as the next one.
            self.abort()
            raise

    def try_receive(self, allocate: Allocate) -> tuple[bytes, memoryview] | None:
        try:
            return self._advance(allocate, 0.0)
        except DeadlineExceeded:
            return None

    def fileno(self) -> int:
        """What to poll for arriving bytes; -1 once the channel has ended."""
        return self._stream.fileno()

    def close(self) -> None:
        self._over = True
        self._stream.finish()

    def abort(self) -> None:
        self._over = True
        self._stream.abort()
