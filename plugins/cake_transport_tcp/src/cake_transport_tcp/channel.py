"""A channel over one TCP connection."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from cake_core.errors import ChannelClosed, DeadlineExceeded, ProtocolError
from cake_core.model import Buffer
from cake_core.transport import Allocate, Channel
from cake_transport_tcp.framing import Inbox, frame
from cake_transport_tcp.wire import Stream


class TcpChannel(Channel):
    """Frames on a stream. While a body arrives, `timeout` counts from its last byte: a large one may take its time, a
    header may not."""

    def __init__(self, stream: Stream, peer: str, binding: bytes | None = None) -> None:
        self.encrypted = binding is not None
        self.binding = b"plain" if binding is None else binding
        self.peer = peer
        self._stream = stream
        self._inbox = Inbox()
        self._sending = threading.Lock()

    def send(self, header: bytes, buffers: Sequence[Buffer] = (), timeout: float | None = None) -> None:
        pieces = frame(header, buffers)
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._sending.acquire(timeout=-1 if timeout is None else timeout):
            self.abort()
            raise DeadlineExceeded(f"{self.peer} did not read in time")
        try:
            self._stream.write(pieces, deadline)
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
            # Also what a faulty `allocate` raises: the rest of its message would be read as the next one.
            self.abort()
            raise

    def _receive(self, allocate: Allocate, timeout: float | None) -> tuple[bytes, memoryview]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (message := self._inbox.next(allocate)) is None:
            if timeout is not None and self._inbox.in_body:
                deadline = time.monotonic() + timeout
            count = self._stream.read(self._inbox.space(), deadline)
            if not count:
                where = " in the middle of a message" if self._inbox.begun else ""
                raise ChannelClosed(f"{self.peer} closed the connection{where}")
            self._inbox.arrived(count)
        return message

    def close(self) -> None:
        self._stream.finish()

    def abort(self) -> None:
        self._stream.abort()
