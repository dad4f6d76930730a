"""Messages over Unix domain sockets: `unix://name:port` is the socket `name-port` in a folder of this user's."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from cake_core.errors import ChannelClosed, ConfigError, DeadlineExceeded, NodeUnreachable, ProtocolError
from cake_core.model import Buffer
from cake_core.transport import MAX_BODY, MAX_HEADER, TRANSPORT_API, Address, Allocate, Channel, Identity, Listener

PREFIX = struct.Struct("<IQ")
FOREVER = 1e6
SOON = 1e-4


class UnixTransport:
    api: ClassVar[int] = TRANSPORT_API
    scheme = "unix"

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path(tempfile.gettempdir()) / f"cake-unix-{os.getuid()}"

    def dial(self, address: Address, identity: Identity | None, timeout: float) -> Channel:
        self._refuse(identity)
        stream = socket.socket(socket.AF_UNIX)
        try:
            stream.settimeout(timeout)
            stream.connect(str(self._path(address)))
        except OSError as error:
            stream.close()
            raise NodeUnreachable(f"nobody listens on {address} ({error})", address=str(address)) from error
        return UnixChannel(stream, str(address))

    def listen(self, address: Address, identity: Identity | None) -> Listener:
        self._refuse(identity)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        ports = [address.port] if address.port else range(1, 65536)
        for port in ports:
            stream, candidate = socket.socket(socket.AF_UNIX), Address(address.host, port, self.scheme)
            try:
                stream.bind(str(self._path(candidate)))
            except OSError:
                stream.close()
                continue
            stream.listen(128)
            return UnixListener(stream, candidate, self._path(candidate))
        raise ConfigError(f"{address} is taken; choose another port or remove {self._path(address)}")

    def _path(self, address: Address) -> Path:
        return self._folder / f"{address.host}-{address.port}"

    def _refuse(self, identity: Identity | None) -> None:
        if identity is not None:
            raise ConfigError("unix:// stays on this machine and does not encrypt; use --insecure with it")


class UnixListener(Listener):
    def __init__(self, stream: socket.socket, address: Address, path: Path) -> None:
        self.address = address
        self._stream, self._path, self._closed = stream, path, threading.Event()

    def accept(self, timeout: float | None = None) -> Channel:
        end = time.monotonic() + (FOREVER if timeout is None else timeout)
        while not self._closed.is_set():
            if time.monotonic() > end:
                raise DeadlineExceeded(f"nobody dialled {self.address} within {timeout} s")
            try:
                # In slices, because closing a listener does not wake `accept` on every system.
                self._stream.settimeout(0.05)
                return UnixChannel(self._stream.accept()[0], "unix://dialler")
            except TimeoutError:
                continue
            except OSError:
                break
        raise ChannelClosed(f"{self.address} is closed")

    def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self._path.unlink(missing_ok=True)
            self._stream.close()


class UnixChannel(Channel):
    encrypted = False
    binding = b"plain"

    def __init__(self, stream: socket.socket, peer: str) -> None:
        self.peer = peer
        # Two objects for one connection, since a timeout belongs to the object and both directions have their own.
        self._in, self._out = stream, stream.dup()
        self._sending, self._lock = threading.Lock(), threading.Lock()
        self._closed, self._users = False, 1

    def send(self, header: bytes, buffers: Sequence[Buffer] = (), timeout: float | None = None) -> None:
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        length = sum(view.nbytes for view in views)
        if not 1 <= len(header) <= MAX_HEADER or length > MAX_BODY:
            raise ProtocolError(f"a message of {len(header)} + {length} bytes is over the limits")
        end = time.monotonic() + (FOREVER if timeout is None else timeout)
        with self._inside(), self._sending:
            try:
                for view in (memoryview(PREFIX.pack(len(header), length) + header), *views):
                    self._out.settimeout(max(SOON, end - time.monotonic()))
                    self._out.sendall(view)
            except TimeoutError as error:
                self.abort()
                raise DeadlineExceeded(f"{self.peer} took no message within {timeout} s") from error
            except OSError as error:
                self.abort()
                raise ChannelClosed(f"{self.peer} closed the channel") from error

    def receive(self, allocate: Allocate, timeout: float | None = None) -> tuple[bytes, memoryview]:
        with self._inside():
            self._in.settimeout(FOREVER if timeout is None else max(SOON, timeout))
            prefix = memoryview(bytearray(PREFIX.size))
            count = self._read(prefix[:1], began=False)
            try:
                self._read(prefix[count:])
                return self._message(allocate, *PREFIX.unpack(prefix))
            except BaseException:
                self.abort()
                raise

    def _message(self, allocate: Allocate, header_length: int, length: int) -> tuple[bytes, memoryview]:
        if not 1 <= header_length <= MAX_HEADER or length > MAX_BODY:
            raise ProtocolError(f"{self.peer} declares {header_length} + {length} bytes, over the limits")
        header = bytearray(header_length)
        self._read(memoryview(header))
        body = allocate(bytes(header), length) if length else memoryview(b"")
        self._read(body.cast("B"))
        return bytes(header), body

    def _read(self, view: memoryview, began: bool = True) -> int:
        """Fills `view`; `began` says whether a message is under way."""
        done = 0
        while done < view.nbytes:
            try:
                count = 0 if self._closed else self._in.recv_into(view[done:])
            except TimeoutError as error:
                raise DeadlineExceeded("the message stopped" if began else "no message in time") from error
            except OSError:
                count = 0
            if count == 0:
                raise ChannelClosed(f"{self.peer} closed the channel")
            done += count
        return done

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with suppress(OSError):
                # What the peer has not read yet stays readable for it; whoever waits here or there wakes.
                self._in.shutdown(socket.SHUT_RDWR)
        self._leave()

    def abort(self) -> None:
        self.close()

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Keeps the descriptors open while a call uses them."""
        with self._lock:
            if self._closed:
                raise ChannelClosed(f"the channel to {self.peer} is closed")
            self._users += 1
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._in.close()
                self._out.close()
