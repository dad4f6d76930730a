"""Listening sockets as one listener."""

from __future__ import annotations

import errno
import logging
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from cake_core.errors import ChannelClosed, DeadlineExceeded
from cake_core.transport import Address, Listener
from cake_transport_tcp.channel import TcpChannel
from cake_transport_tcp.sockets import bind, name

log = logging.getLogger(__name__)

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class TcpListener(Listener):
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
        if not self._accepting.acquire(timeout=-1 if timeout is None else timeout):
            raise DeadlineExceeded(f"nobody connected to {self.address} in time")
        try:
            while True:
                channel = self._try()
                if channel is not None:
                    return channel
                self._wait(deadline)
        finally:
            self._accepting.release()
            self._free()

    def close(self) -> None:
        with self._state:
            if not self._closed:
                self._closed = True
                self._waker.send(b"\0")
        self._free()

    def _try(self) -> TcpChannel | None:
        for sock in self._sockets:
            if self._closed:
                raise ChannelClosed(f"{self.address} is closed")
            try:
                connection, where = sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise ChannelClosed(f"cannot accept on {self.address}: {error.strerror or error}") from error
                log.warning("%s: %s; new connections wait until others have ended", self.address, error.strerror)
                time.sleep(0.1)
                continue
            return self._welcome(connection, name(where))
        return None

    def _wait(self, deadline: float | None) -> None:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise DeadlineExceeded(f"nobody connected to {self.address} in time")
        # select() is limited to small descriptors; poll() is not, but Windows has only the first.
        if hasattr(select, "poll"):
            poll = select.poll()
            for sock in (*self._sockets, self._wake):
                poll.register(sock, select.POLLIN)
            poll.poll(None if left is None else left * 1000)
        else:
            select.select([*self._sockets, self._wake], (), (), left)

    def _free(self) -> None:
        """Closes the sockets once nobody waits on them: the last one out does."""
        if self._closed and self._accepting.acquire(blocking=False):
            try:
                for sock in (*self._sockets, self._wake, self._waker):
                    sock.close()
            finally:
                self._accepting.release()
