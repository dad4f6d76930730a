"""Connections between master and workers, whoever dials: transports, the cluster key and hellos put together.

A worker with a host in the topology listens, and the master dials it. One without (behind NAT, say) dials the master, which
listens and hands the channel to whoever waits for that node's name. Above this nobody can tell the difference.
"""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Callable, Collection
from pathlib import Path

from cake_core import security
from cake_core.errors import CakeError, ConfigError, NodeMismatch, NodeUnreachable, TransportError
from cake_core.plugins import Plugins
from cake_core.security.hello import TICKET, check_hello, hello_node, hello_ticket, make_hello
from cake_core.security.keys import ClusterKey, obtain_key
from cake_core.topology import MASTER
from cake_core.transport import Address, Channel

Invite = Callable[[bytes], object]
"""`invite(ticket)` has a worker that joined dial once more and show this ticket."""


class Keyring:
    """The cluster key of this process, looked up (or made) when a connection first needs it. `insecure`: there is none."""

    def __init__(self, flag: str | None, config_dir: Path, insecure: bool, announce: Callable[[ClusterKey], None]) -> None:
        self._flag = flag
        self._config_dir = config_dir
        self._announce = announce
        self._lock = threading.Lock()
        self._key: ClusterKey | None = None
        self.insecure = insecure

    def key(self) -> ClusterKey | None:
        """Raises ConfigError for a key that cannot be read. A new one is announced, so that the user can copy it."""
        if self.insecure:
            return None
        with self._lock:
            if self._key is None:
                self._key = obtain_key(self._flag, self._config_dir)
                if self._key.made:
                    self._announce(self._key)
            return self._key


class Connector:
    """The master's way to its workers. `joining` names those without a host, who dial the master at `listen_at`; None lets
    everybody join who has the key."""

    def __init__(
        self, plugins: Plugins, keyring: Keyring, joining: Collection[str] | None = (), listen_at: Address | None = None
    ) -> None:
        self._plugins = plugins
        self._keyring = keyring
        self._arrivals: dict[str, queue.SimpleQueue[Channel]] = {name: queue.SimpleQueue() for name in joining or ()}
        self._invited: dict[bytes, tuple[str, queue.SimpleQueue[Channel]]] = {}
        self._inviting = threading.Lock()
        self._open = joining is None
        self._gate: security.Gate | None = None
        if joining and listen_at is None:
            raise ConfigError(
                f"node {next(iter(joining))!r} has no host in the topology; add host: 'address:port', or give the master "
                "--listen HOST:PORT and start the worker with --join HOST:PORT"
            )
        if listen_at is not None:
            transport = plugins.transport(listen_at.scheme)
            self._gate = security.listen(transport, listen_at, keyring.key(), make_hello(), self._admit)
            threading.Thread(target=self._receive, name="cake-rendezvous", daemon=True).start()

    @property
    def address(self) -> Address | None:
        """Where it listens, with the port the system chose."""
        return None if self._gate is None else self._gate.address

    def dial(self, address: Address, timeout: float) -> Channel:
        """An authenticated channel to a worker that listens. Raises NodeUnreachable and what `security.dial` raises."""
        transport = self._plugins.transport(address.scheme)
        return _checked(*security.dial(transport, address, self._keyring.key(), make_hello(), timeout))

    def joined(self, name: str, timeout: float) -> Channel:
        """An authenticated channel to a worker that dials us. Raises NodeUnreachable when it has not."""
        try:
            # A short wait at a time: the caller tries again, and meanwhile knows why.
            return self._queue(name).get(timeout=min(timeout, 0.5))
        except queue.Empty:
            raise NodeUnreachable(
                f"{name} has not joined at {self.address} yet; start `cake worker --name {name} --join HOST:PORT` there", name
            ) from None

    def joined_again(self, name: str, invite: Invite, timeout: float) -> Channel:
        """A further channel to a worker that joined us; `invite` asks it for that. Raises NodeUnreachable when none comes."""
        ticket, came = secrets.token_bytes(TICKET), queue.SimpleQueue[Channel]()
        with self._inviting:
            self._invited[ticket] = name, came
        try:
            invite(ticket)
            return came.get(timeout=timeout)
        except queue.Empty:
            raise NodeUnreachable(f"{name} did not dial {self.address} again in {timeout:g} s", name) from None
        finally:
            with self._inviting:
                late = self._invited.pop(ticket, None) is None and not came.empty()
            if late:
                came.get().abort()

    def arrived(self) -> list[str]:
        """Names of the workers that have joined and that nobody talks to yet."""
        return [name for name, waiting in list(self._arrivals.items()) if not waiting.empty()]

    def _queue(self, name: str) -> queue.SimpleQueue[Channel]:
        return self._arrivals.setdefault(name, queue.SimpleQueue()) if self._open else self._arrivals[name]

    def close(self) -> None:
        """Stops listening. Channels handed out live on."""
        if self._gate is not None:
            self._gate.close()

    def _admit(self, hello: bytes, peer: str) -> None:
        check_hello(hello, peer)
        node, ticket = hello_node(hello), hello_ticket(hello)
        if ticket:
            self._check_ticket(ticket, node, peer)
            return
        if self._open and node and node != MASTER:
            return
        if node not in self._arrivals:
            names = ", ".join(self._arrivals)
            raise NodeMismatch(f"{peer} joins as {node!a}, but here only {names} may join", node, peer)

    def _check_ticket(self, ticket: bytes, node: str, peer: str) -> None:
        name, _ = self._invited.get(ticket, ("", None))
        if not name or name != node:
            raise NodeMismatch(f"{peer} comes as {node!a} with a ticket that is not good (any more)", node, peer)

    def _receive(self) -> None:
        gate = self._gate
        while gate is not None:
            try:
                channel, hello = gate.accept()
            except TransportError:
                return
            ticket = hello_ticket(hello)
            if not ticket:
                self._queue(hello_node(hello)).put(channel)
                continue
            with self._inviting:  # each is good once
                _, came = self._invited.pop(ticket, ("", None))
                if came is not None:
                    came.put(channel)
            if came is None:
                channel.abort()


def dial_master(
    plugins: Plugins, keyring: Keyring, address: Address, name: str, timeout: float, ticket: bytes = b""
) -> Channel:
    """The joining worker's side: an authenticated channel to the master's listening address. `ticket` is what the master asked
    for it with, where it wants a further one."""
    transport = plugins.transport(address.scheme)
    return _checked(*security.dial(transport, address, keyring.key(), make_hello(name, ticket), timeout))


def open_gate(plugins: Plugins, keyring: Keyring, address: Address, name: str) -> security.Gate:
    """A worker's door. Raises ConfigError when the address cannot be had."""
    return security.listen(plugins.transport(address.scheme), address, keyring.key(), make_hello(name), check_hello)


def _checked(channel: Channel, hello: bytes) -> Channel:
    try:
        check_hello(hello, channel.peer)
    except CakeError:
        channel.abort()
        raise
    return channel
