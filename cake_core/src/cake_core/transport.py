"""The contract of a transport plugin: whole messages between two processes, over blocking channels.

A transport moves bytes, encrypts them and says what binds an encryption to this connection. It never sees the cluster
key: authentication, requests, heartbeats, deadlines and credits are core's, once, over any channel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from cake_core.errors import ConfigError
from cake_core.model import Buffer

TRANSPORT_API = 1
"""Version of this contract. A transport states the one it was written for in `Transport.api`."""

DEFAULT_SCHEME = "tcp"
DEFAULT_PORT = 10128

MAX_HEADER = 64 * 1024
"""Largest header of a message in bytes. A peer that declares more is refused before anything is allocated."""

MAX_BODY = 1024 * 1024 * 1024
"""Largest body of a message in bytes that a transport accepts at all; `allocate` refuses earlier."""

Allocate = Callable[[bytes, int], memoryview]
"""`allocate(header, length)` hands out writable memory of `length` bytes for a message's body, or raises ProtocolError to
refuse it, which closes the channel. Not called for an empty body."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a process shows in TLS: an ephemeral self-signed certificate and its key, PEM."""

    certificate: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class Address:
    """`scheme://host:port`; the scheme defaults to tcp, the port to 10128, IPv6 hosts stand in brackets."""

    host: str
    port: int = DEFAULT_PORT
    scheme: str = DEFAULT_SCHEME

    @classmethod
    def parse(cls, text: str, default_port: int = DEFAULT_PORT) -> Address:
        """Raises ConfigError with what is wrong with `text`."""
        scheme, separator, rest = text.strip().partition("://")
        if not separator:
            scheme, rest = DEFAULT_SCHEME, text.strip()
        rest = rest.rstrip("/")
        if rest.startswith("["):
            host, bracket, port = rest[1:].partition("]")
            if not bracket:
                raise ConfigError(f"{text!r}: missing ']' after the IPv6 address")
            port = port.removeprefix(":")
        elif rest.count(":") > 1:
            raise ConfigError(f"{text!r}: put an IPv6 address in brackets, like [::1]:{default_port}")
        else:
            host, _, port = rest.partition(":")
        if not host or not scheme:
            raise ConfigError(f"{text!r} is not an address; write host:port, e.g. 192.168.1.2:{default_port}")
        if port and not (port.isascii() and port.isdigit() and int(port) < 65536):
            raise ConfigError(f"{text!r}: {port!r} is not a port; ports are numbers up to 65535")
        return cls(host, int(port) if port else default_port, scheme)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


class Channel(ABC):
    """A duplex, ordered, reliable stream of whole messages. One reader thread and any number of writers.

    A message is a header (1 to MAX_HEADER bytes, opaque here) and a body of 0 to MAX_BODY bytes.
    """

    encrypted: bool
    """Whether nobody between the two processes can read or change bytes unnoticed."""
    binding: bytes
    """What ties an authentication to this very connection: the same on both ends, different on any other connection a
    third party could relay it to (SHA-256 of the listener's certificate). `b"plain"` without encryption."""
    peer: str
    """The other end's address, for messages."""

    @abstractmethod
    def send(self, header: bytes, buffers: Sequence[Buffer] = (), timeout: float | None = None) -> None:
        """Sends one message whose body is the buffers one after another; returns when they may be reused.

        Blocks while the peer reads slowly. Messages of several threads never mix.

        Raises:
            ChannelClosed: closed by either side; the message may have arrived in part, and nothing more can be sent.
            DeadlineExceeded: for `timeout` seconds the peer took nothing; the channel is aborted.
            ProtocolError: header or body over the limit; nothing was sent.
        """

    @abstractmethod
    def receive(self, allocate: Allocate, timeout: float | None = None) -> tuple[bytes, memoryview]:
        """The next message; its body is read straight into what `allocate` hands out.

        Raises:
            ChannelClosed: the peer closed, also in the middle of a message, or we did from another thread.
            DeadlineExceeded: no byte came for `timeout` seconds. Between messages the channel stays usable; in the middle
                of one it is aborted. A slow message that keeps coming is never cut off.
            ProtocolError: a length over the limits, or a refusal by `allocate`; the channel is aborted.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends the channel in order: what `send` has returned from still arrives. Wakes a blocked receive. Idempotent."""

    @abstractmethod
    def abort(self) -> None:
        """Ends the channel at once, from any thread, waking whoever is blocked in it. Idempotent."""


class Listener(ABC):
    address: Address
    """Where it listens, with the port the system chose when 0 was asked for."""

    @abstractmethod
    def accept(self, timeout: float | None = None) -> Channel:
        """The next connection. It returns before a byte of the peer is awaited: an encryption handshake happens in the
        channel's first use, so one silent peer holds up nobody.

        Raises ChannelClosed after `close`, DeadlineExceeded after `timeout` seconds.
        """

    @abstractmethod
    def close(self) -> None:
        """Stops listening and wakes `accept`. Accepted channels live on. Idempotent."""


class PollingChannel(Channel):
    """A channel of a `PollingListener`."""

    @abstractmethod
    def try_receive(self, allocate: Allocate) -> tuple[bytes, memoryview] | None:
        """The next message if it has arrived in whole, without waiting; None if not, and what has arrived is kept.

        Raises what `receive` does, except DeadlineExceeded.
        """


class PollingListener(Listener):
    """What a transport may offer beyond a listener, so that one thread carries all peers that have not proved themselves.

    Without it, core gives each of them a thread, as few as the limits allow.
    """

    @abstractmethod
    def poll(
        self, watched: Collection[PollingChannel], timeout: float | None
    ) -> tuple[Sequence[PollingChannel], Sequence[PollingChannel]]:
        """Waits until someone connects or a watched channel has something to read or has ended: (new, ready).

        `watched` are channels that came from this listener and have no other reader. Both lists are empty after `timeout`
        seconds. Raises ChannelClosed after `close`, which wakes it.
        """


@runtime_checkable
class Transport(Protocol):
    """One way to reach another process, chosen by the scheme of an address. Instances are cheap and import lazily."""

    api: ClassVar[int]
    scheme: str

    def dial(self, address: Address, identity: Identity | None, timeout: float) -> Channel:
        """Connects and, with an identity, encrypts.

        Raises NodeUnreachable when nobody answers in `timeout` seconds, saying how that looked (refused, no route, name
        unknown), TransportError when the other end does not speak this.
        """

    def listen(self, address: Address, identity: Identity | None) -> Listener:
        """Listens, with encryption if an identity is given. Raises ConfigError when the address cannot be had."""
