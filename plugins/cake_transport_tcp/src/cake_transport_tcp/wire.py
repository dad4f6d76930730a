"""A connected socket that one reader and one writer use at the same time and that any thread may end.

The socket never blocks; waiting is a poll on it and on a second descriptor that becomes readable when the wire is ended.
So each call has its own deadline, and nobody closes a descriptor that another thread waits on.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from cake_core.errors import ChannelClosed, DeadlineExceeded

LINGER = 2.0
"""Seconds for which a closed wire waits for the peer to have read everything."""
_VECTORS = 64  # buffers per sendmsg: far below every system's IOV_MAX
_JOIN = 64 * 1024  # without sendmsg, messages up to this size are joined: one packet instead of many


class Stream(Protocol):
    """Bytes in both directions: a wire, or TLS on one.

    A deadline is a moment of `time.monotonic()`, patience are seconds without any progress; None waits for ever.
    """

    @property
    def written(self) -> int:
        """Bytes handed to the system so far: whether a writer gets on."""

    def read(self, into: memoryview, deadline: float | None) -> int:
        """Reads some bytes and says how many, 0 at the peer's end. ChannelClosed, DeadlineExceeded."""

    def write(self, pieces: Sequence[memoryview], patience: float | None) -> None:
        """Writes all, in one call to the system if it takes them. ChannelClosed, DeadlineExceeded (then: in part)."""

    def finish(self) -> None:
        """Ends in order: what was written still arrives."""

    def abort(self) -> None:
        """Ends at once."""

    def fileno(self) -> int:
        """For polling; -1 once ended."""


class Readiness:
    """Waits until a socket can be read, or written, or `wake` says that it is over.

    `left`: for a writer, the peer has ended its side, so nobody will read what is still to be written.
    """

    def __init__(self, sock: socket.socket, wake: socket.socket, writing: bool = False) -> None:
        self._reads = [wake] if writing else [sock, wake]
        self._writes = [sock] if writing else []
        self.left = False
        self._poll = None
        # Linux says when the peer has left. Elsewhere a writer learns it when the peer has stopped lingering.
        self._hangup = getattr(select, "POLLRDHUP", 0) if writing else 0
        if hasattr(select, "poll"):
            self._poll = select.poll()
            self._poll.register(wake, select.POLLIN)
            self._poll.register(sock, (select.POLLOUT if writing else select.POLLIN) | self._hangup)

    def wait(self, deadline: float | None) -> bool:
        """Whether anything happened before the deadline."""
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if self._poll is not None:
            events = self._poll.poll(None if left is None else left * 1000)
            if self._hangup:
                self.left = any(event & self._hangup for _, event in events)
            return bool(events)
        readable, writable, _ = select.select(self._reads, self._writes, (), left)
        return bool(readable or writable)


class Wire:
    """See the module. `peer` is the other end's address, for messages."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        sock.setblocking(False)
        self.peer = peer
        self.written = 0
        self._sock = sock
        self._wake, self._waker = socket.socketpair()
        self._readable = Readiness(sock, self._wake)
        self._writable = Readiness(sock, self._wake, writing=True)
        self._vectored = hasattr(sock, "sendmsg")
        self._drained = True
        self._state = threading.Lock()
        self._reading = False
        self._writing = False
        self._ended = False
        self._orderly = False
        self._released = False

    def fileno(self) -> int:
        return -1 if self._ended else self._sock.fileno()

    def read(self, into: memoryview, deadline: float | None) -> int:
        self._reading = True
        try:
            if self._ended:
                raise self._closed()
            while True:
                # A short read emptied the socket, so the next byte has to be waited for: no vain attempt first.
                if self._drained:
                    if not self._readable.wait(deadline):
                        raise self._late()
                    if self._ended:
                        raise self._closed()
                try:
                    count = self._sock.recv_into(into)
                except BlockingIOError:
                    self._drained = True
                    continue
                self._drained = count < into.nbytes
                return count
        except OSError as error:
            raise ChannelClosed(f"lost {self.peer}: {error.strerror or error}") from error
        finally:
            self._reading = False
            if self._ended:
                self._release()

    def write(self, pieces: Sequence[memoryview], patience: float | None) -> None:
        self._writing = True
        try:
            left = list(pieces)
            while left:
                # Looked at before every piece: a reader that keeps up would have an aborted message sent to its end.
                if self._ended:
                    raise self._closed()
                sent = self._send(left)
                if not sent:
                    if not self._writable.wait(None if patience is None else time.monotonic() + patience):
                        raise self._late()
                    if self._writable.left and not self._ended:
                        raise ChannelClosed(f"{self.peer} closed the connection")
                self.written += sent
                left = _behind(left, sent)
        except OSError as error:
            raise ChannelClosed(f"lost {self.peer}: {error.strerror or error}") from error
        finally:
            self._writing = False
            if self._ended:
                self._release()

    def finish(self) -> None:
        self._end(orderly=True)

    def abort(self) -> None:
        self._end(orderly=False)

    def _send(self, pieces: list[memoryview]) -> int:
        """Bytes the system took, 0 if none."""
        try:
            if self._vectored:
                return self._sock.sendmsg(pieces[:_VECTORS])
            if len(pieces) > 1 and sum(piece.nbytes for piece in pieces) <= _JOIN:
                return self._sock.send(b"".join(pieces))
            return self._sock.send(pieces[0])
        except BlockingIOError:
            return 0

    def _late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self.peer} did not answer in time")

    def _closed(self) -> ChannelClosed:
        return ChannelClosed(f"the connection to {self.peer} was closed here")

    def _end(self, orderly: bool) -> None:
        with self._state:
            if self._ended:
                return
            self._ended, self._orderly = True, orderly
            with contextlib.suppress(OSError):  # the peer may have reset the connection already
                if orderly:
                    self._sock.shutdown(socket.SHUT_WR)
                else:
                    # A reset instead of an orderly end: the system keeps nothing of an aborted connection.
                    self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _reset())
            self._waker.send(b"\0")
        self._release()

    def _release(self) -> None:
        """If nobody is inside any more, gives the descriptors back; an orderly end only after the peer has read all.

        Who enters says so before looking whether it is over, who ends it does the reverse, and whoever leaves looks again:
        the last one out comes by here, without a lock on the way of every message.
        """
        with self._state:
            if self._released or self._reading or self._writing:
                return
            self._released = True
        if self._orderly and not self._emptied():
            threading.Thread(target=self._linger, name="cake-tcp-linger", daemon=True).start()
        else:
            self._free()

    def _linger(self) -> None:
        # Closing a socket with unread bytes resets the connection, and the peer would lose what is on its way to it.
        deadline = time.monotonic() + LINGER
        with contextlib.suppress(OSError):
            while not self._emptied() and (left := deadline - time.monotonic()) > 0:
                _await_readable(self._sock, left)
        self._free()

    def _emptied(self) -> bool:
        """Whether the peer has ended its side too."""
        try:
            while self._sock.recv(64 * 1024):
                pass
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def _free(self) -> None:
        for sock in (self._sock, self._wake, self._waker):
            sock.close()


def _behind(pieces: list[memoryview], sent: int) -> list[memoryview]:
    """What is left after `sent` bytes."""
    for index, piece in enumerate(pieces):
        if sent < piece.nbytes:
            return [piece[sent:], *pieces[index + 1 :]]
        sent -= piece.nbytes
    return []


def _await_readable(sock: socket.socket, seconds: float) -> None:
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        poll.poll(seconds * 1000)
    else:
        select.select([sock], (), (), seconds)


def _reset() -> bytes:
    # Windows' struct linger has two u_short, everybody else's two int.
    return struct.pack("HH" if hasattr(socket, "SIO_KEEPALIVE_VALS") else "ii", 1, 0)
