"""The workers as the master sees them: each kept connected, compared with what the topology says, and watched."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from typing import Any, Protocol

from cake_core.cluster.expectation import Expectation
from cake_core.cluster.naming import named
from cake_core.errors import (
    AuthenticationError,
    CakeError,
    CapacityError,
    ChannelClosed,
    ConfigError,
    NodeLost,
    NodeMismatch,
    NodeUnassigned,
    NodeUnreachable,
    ProtocolError,
)
from cake_core.links.backoff import Backoff
from cake_core.links.link import Link, LinkTiming
from cake_core.links.reports import NodeStatus, State, read_count, read_memory
from cake_core.model import Memory
from cake_core.stages.stage import Opened
from cake_core.transport import Channel
from cake_core.wire.protocol import Message, Type

log = logging.getLogger(__name__)

ATTACH_TIMEOUT = 30.0
FRESH = 1.0
"""Seconds for which a report is good enough for those who look."""
PERMANENT = (NodeMismatch, AuthenticationError, ProtocolError, ConfigError, CapacityError)
"""What keeps a node away for good: to wait is of no use."""


Dial = Callable[[float], Channel]
"""`dial(timeout)` gives an authenticated channel."""


class Assigner(Protocol):
    """Has a worker load its layers before the master attaches (cake_core.cluster.assigner)."""

    @property
    def active(self) -> bool:
        """Whether `assign` is at work."""

    def assign(self, link: Link) -> None:
        """Returns when the layers are loaded. Raises what keeps the worker from it."""

    def handle(self, link: Link, message: Message) -> bool:
        """Takes a message of the worker that belongs to an assignment; False for others."""


class RemoteNode:
    """One worker. A thread keeps it connected until `close`; `on_change(node)` is told of every change of state."""

    def __init__(
        self,
        name: str,
        address: str,
        dial: Dial,
        expectation: Expectation,
        on_change: Callable[[RemoteNode], None],
        timing: LinkTiming | None = None,
        assigner: Assigner | None = None,
    ) -> None:
        self.name = name
        self.address = address
        self.expectation = expectation
        self._dial = dial
        self._on_change = on_change
        self._timing = timing or LinkTiming()
        self._assigner = assigner
        self.opened = Opened()
        self._token = secrets.token_bytes(16)
        self._coming: Link | None = None
        self._changed = threading.Condition()
        self._state: State = "connecting"
        self._since = time.time()
        self._link: Link | None = None
        self._error: CakeError | None = None
        self._report: Mapping[str, Any] = {}
        self._asked = 0.0
        self._closed = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"cake-node-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the link and the thread. Idempotent."""
        self._closed.set()
        self._lost.set()
        for link in (self._link, self._coming):
            if link is not None:
                link.close()
                link.join()
        if self._thread.ident is not None:
            self._thread.join(10.0)

    @property
    def state(self) -> State:
        return self._state

    @property
    def loading(self) -> bool:
        """Whether the worker is there and fetches or loads what it was assigned: that may take as long as it takes."""
        return self._assigner is not None and self._assigner.active

    @property
    def error(self) -> CakeError | None:
        """Why the node is not up."""
        return self._error

    def link(self) -> Link:
        """The link. Raises NodeError, naming the node, when it is down."""
        link = self._link
        if link is None:
            raise named(self._error or NodeLost("not connected"), self.name, self.address)
        if not link.up:  # it has fallen a moment ago, and its thread has not told us yet
            raise named(link.reason(), self.name, self.address)
        return link

    def wait_known(self, timeout: float) -> None:
        """Waits until the node is up or loads what it was assigned. Raises as `wait_up`."""
        if not self._wait(timeout, lambda: self._link is not None or self.loading):
            self.link()

    def wait_up(self, timeout: float) -> Link:
        """Waits for the link. Raises what keeps it down: at once where waiting cannot mend it, else after `timeout` s."""
        while not self._wait(timeout, lambda: self._link is not None) and self.loading:
            timeout = 1.0
        return self.link()

    def _wait(self, timeout: float, reached: Callable[[], bool]) -> bool:
        until = time.monotonic() + timeout
        with self._changed:
            while not reached():
                left = until - time.monotonic()
                if left <= 0 or self._closed.is_set() or isinstance(self._error, PERMANENT):
                    return False
                self._changed.wait(min(left, 0.2) if self._assigner is not None else left)
        return True

    def memory_of(self, layers: tuple[str, ...]) -> Memory:
        memory = self._report.get("memory", [])
        index = self.expectation.stages.index(layers)
        return read_memory(memory[index]) if index < len(memory) else Memory("", "", 0)

    def status(self) -> NodeStatus:
        """As it was last heard of; whoever looks again after FRESH seconds sees what it reports now."""
        link = self._link
        if link is not None and time.monotonic() - self._asked > FRESH:
            self._asked = time.monotonic()
            link.ask(Type.STATUS, {}).add_done_callback(self._told)
        return NodeStatus(
            self.name,
            self.address,
            self._state,
            self.expectation.layers,
            self._since,
            str(self._error or ""),
            tuple(read_memory(entry) for entry in self._report.get("memory", [])),
            self._report.get("platform", {}),
            link.count if link else None,
            tuple(read_count(entry) for entry in self._report.get("work", [])),
        )

    def refresh(self, timeout: float = 5.0) -> None:
        """Asks for a report and waits for it, so that `status` is of now; not longer than `timeout` seconds."""
        link = self._link
        if link is not None:
            answer = link.ask(Type.STATUS, {})
            wait([answer], timeout)
            if answer.done():
                self._told(answer)

    def _told(self, answer: Future[tuple[Message, memoryview]]) -> None:
        if not answer.cancelled() and answer.exception() is None:
            self._report = answer.result()[0].fields["report"]

    # The thread

    def _keep(self) -> None:
        backoff = Backoff(self._closed)
        while not self._closed.is_set():
            self._lost.clear()
            try:
                link = self._connect()
            except CakeError as error:
                self._set("down" if self._state != "connecting" else "connecting", None, error)
                backoff.wait(isinstance(error, PERMANENT))
                continue
            since = time.monotonic()
            self._set("up", link, None)
            if not link.up:  # it fell before anybody could know it was ours
                self._fell(link, link.reason())
            self._lost.wait()
            if not self._closed.is_set():
                log.warning("%s at %s is lost: %s", self.name, self.address, self._error)
            if time.monotonic() - since > self._timing.heartbeat:
                backoff = Backoff(self._closed)
            else:  # or one that stays for moments would be connected to as fast as the network allows
                backoff.wait()

    def _connect(self) -> Link:
        channel = self._dial(min(5.0, self._timing.dead))
        link = Link(channel, f"{self.name} at {self.address}", self._handle, self._fell, self._timing)
        self._coming = link
        link.start()
        if self._closed.is_set():
            link.close()
        try:
            try:
                message = self._attach(link)
            except NodeUnassigned:
                if self._assigner is None:
                    raise
                self._assigner.assign(link)
                message = self._attach(link)
            self.expectation.check(message.fields, self.name, self.address)
        except TimeoutError:
            link.close()
            raise NodeUnreachable(f"{self.name} at {self.address} does not answer; restart it", self.name) from None
        except ChannelClosed as error:  # it took the connection and left before it was ours: a process that is ending
            link.close()
            raise NodeUnreachable(f"{self.name} at {self.address} hung up ({error}); start it again", self.name) from error
        except CakeError:
            link.close()
            raise
        finally:
            self._coming = None
        self._report = message.fields
        return link

    def _attach(self, link: Link) -> Message:
        fields = self.expectation.attach_fields(self._token, self.opened.listed())
        return link.ask(Type.ATTACH, fields).result(ATTACH_TIMEOUT)[0]

    def _handle(self, link: Link, message: Message, _body: memoryview) -> None:
        if self._assigner is not None and self._assigner.handle(link, message):
            return
        if message.type is Type.PARTED:
            ticket = message.fields["ticket"]
            after = link.hops.get(ticket, "the next worker")
            link.part(ticket, NodeLost(f"{self.name} has lost {after}: {message.fields['message']}", self.name, self.address))
        elif message.type is not Type.DRAINING:
            raise ProtocolError(f"a worker does not send {message.type.name}")
        elif link is self._link:
            self._set("draining", link, NodeLost(f"{self.name} is shutting down", self.name, self.address))

    def _fell(self, link: Link, error: CakeError) -> None:
        with self._changed:
            current = link is self._link
        if current:
            self._set("down", None, named(error, self.name, self.address))
            self._lost.set()

    def _set(self, state: State, link: Link | None, error: CakeError | None) -> None:
        with self._changed:
            if state != self._state:
                self._since = time.time()
            self._state, self._link, self._error = state, link, error
            self._changed.notify_all()
        self._on_change(self)
