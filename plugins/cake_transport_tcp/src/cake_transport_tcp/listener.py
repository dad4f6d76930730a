"""Listening sockets as one listener."""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

from cake_core.errors import ChannelClosed, DeadlineExceeded
from cake_core.transport import Address, PollingChannel, PollingListener
from cake_transport_tcp.channel import TcpChannel
from cake_transport_tcp.sockets import bind, name

_AT_ONCE = 64  # accepted in one turn, so that those already here get theirs
log = logging.getLogger(__name__)

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class TcpListener(PollingListener):
    """`welcome(socket, peer)` makes a channel of an accepted connection without waiting for it."""

    def __init__(self, address: Address, welcome: Callable[[socket.socket, str], TcpChannel]) -> None:
        self._sockets = bind(address)
        self._welcome = welcome
        self.address = replace(address, port=self._sockets[0].getsockname()[1])
        self._wake, self._waker = socket.socketpair()
        self._accepting = threading.Lock()
        self._state = threading.Lock()
        self._closed = False

    def accept(self, timeout: float | None = None) -> TcpChannel:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._turn(timeout):
            while True:
                for channel in self._accept(1):
                    return channel
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise DeadlineExceeded(f"nobody connected to {self.address} in time")
                self._wait((), left)

    def poll(
        self, watched: Collection[PollingChannel], timeout: float | None
    ) -> tuple[Sequence[PollingChannel], Sequence[PollingChannel]]:
        channels = [channel for channel in watched if isinstance(channel, TcpChannel)]
        with self._turn(timeout):
            ended = [channel for channel in channels if channel.fileno() < 0]
            ready = self._wait([c for c in channels if c.fileno() >= 0], 0.0 if ended else timeout)
            return self._accept(_AT_ONCE), ended + ready

    def close(self) -> None:
        with self._state:
            if not self._closed:
                # In this order: whoever sees it closed may free the sockets. The byte is never read, so it wakes until then.
                self._waker.send(b"\0")
                self._closed = True
        self._free()

    @contextlib.contextmanager
    def _turn(self, timeout: float | None) -> Iterator[None]:
        if not self._accepting.acquire(timeout=-1 if timeout is None else timeout):
            raise DeadlineExceeded(f"nobody connected to {self.address} in time")
        try:
            if self._closed:
                raise ChannelClosed(f"{self.address} is closed")
            yield
        finally:
            self._accepting.release()
            self._free()

    def _accept(self, most: int) -> list[TcpChannel]:
        """Those who have connected already, `most` at once."""
        found: list[TcpChannel] = []
        for sock in self._sockets:
            while len(found) < most and not self._closed:
                try:
                    connection, where = sock.accept()
                except ConnectionAbortedError:
                    continue
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno not in _EXHAUSTED:
                        raise ChannelClosed(f"cannot accept on {self.address}: {error.strerror or error}") from error
                    log.warning("%s: %s; new connections wait until others have ended", self.address, error.strerror)
                    time.sleep(0.1)
                    break
                with contextlib.suppress(OSError):  # it may have gone again already
                    found.append(self._welcome(connection, name(where)))
        if self._closed:
            for channel in found:
                channel.abort()
            raise ChannelClosed(f"{self.address} is closed")
        return found

    def _wait(self, watched: Sequence[TcpChannel], timeout: float | None) -> list[TcpChannel]:
        """Waits for a connection, for one of these, or for `close`; which of these are ready."""
        by_number = {channel.fileno(): channel for channel in watched}
        numbers = [sock.fileno() for sock in (*self._sockets, self._wake)] + list(by_number)
        # select() is limited to small descriptors; poll() is not, but Windows has only the first.
        if hasattr(select, "poll"):
            poll = select.poll()
            for number in numbers:
                if number >= 0:
                    poll.register(number, select.POLLIN)
            ready = [number for number, _ in poll.poll(None if timeout is None else max(0.0, timeout) * 1000)]
        else:
            ready, _, _ = select.select([n for n in numbers if n >= 0], (), (), timeout)
        return [by_number[number] for number in ready if number in by_number]

    def _free(self) -> None:
        """Closes the sockets once nobody waits on them: the last one out does."""
        if self._closed and self._accepting.acquire(blocking=False):
            try:
                for sock in (*self._sockets, self._wake, self._waker):
                    sock.close()
            finally:
                self._accepting.release()
