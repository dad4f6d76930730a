"""Stages as the engine sees them: local or remote, the same interface."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, wait
from typing import Protocol

from cake_core.errors import CakeError, NodeLost, RewindError, StageError
from cake_core.links.link import Link
from cake_core.links.reports import StageClock
from cake_core.model import Batch, Memory, Pending, SessionSpec, TextStage
from cake_core.stages.inputs import read_by
from cake_core.wire.codec import spec_to_fields
from cake_core.wire.protocol import Message, Type


class Stage(Protocol):
    """What the engine needs of a stage. Calls may come from several threads; each sees them in its own order."""

    node: str
    layers: tuple[str, ...]
    runs_ahead: bool

    def bound(self) -> Stage:
        """The stage as it is reached now: for good or, over a link, until that falls. Raises NodeError when there is none."""

    def open(self, session: int, spec: SessionSpec, parent: int | None = None, length: int = 0) -> int: ...

    def submit(self, batch: Batch) -> Pending: ...

    def truncate(self, session: int, length: int) -> int: ...

    def close(self, session: int) -> None: ...

    def memory(self) -> Memory: ...


class LocalStage:
    """A backend's stage in this process, one call at a time. Work is done in the calling thread: no hand-off."""

    def __init__(self, node: str, stage: TextStage) -> None:
        self.node = node
        self.layers = stage.layers
        self.reads = read_by(stage.layers)
        self.runs_ahead = bool(getattr(stage, "runs_ahead", False))
        self._stage = stage
        self._lock = threading.Lock()
        self._sessions: set[int] = set()
        self.clock = StageClock()

    def bound(self) -> LocalStage:
        return self

    def open(self, session: int, spec: SessionSpec, parent: int | None = None, length: int = 0) -> int:
        """As the backend's, but from a parent that is not here a session starts empty: it was lost with a node, say."""
        with self._lock:
            kept = self._stage.open(session, spec, *((parent, length) if parent in self._sessions else (None, 0)))
            self._sessions.add(session)
            return kept

    def submit(self, batch: Batch) -> Pending:
        began = time.perf_counter()
        try:
            with self._lock:
                self._rewind(batch)
                pending = self._stage.submit(batch)
            pending.when_done(lambda _: self.clock.ended(began, batch.positions))
            return pending
        except CakeError as error:
            return _failed(error)
        except Exception as error:
            # A backend's bug ends the requests of this batch, not the thread that carries everybody's.
            return _failed(StageError(f"{self.node}: {type(error).__name__}: {error}"))

    def _rewind(self, batch: Batch) -> None:
        for row in batch.rows:
            if row.rewind and (kept := self._stage.truncate(row.session, row.position)) != row.position:
                raise RewindError(f"{self.node} went back to position {kept} instead of {row.position}; compute it again")

    def truncate(self, session: int, length: int) -> int:
        with self._lock:
            return self._stage.truncate(session, length)

    def close(self, session: int) -> None:
        with self._lock:
            self._sessions.discard(session)
            self._stage.close(session)

    def memory(self) -> Memory:
        with self._lock:
            return self._stage.memory()

    def shutdown(self) -> None:
        with self._lock:
            self._stage.shutdown()


def _failed(error: CakeError) -> Pending:
    pending = Pending()
    pending.fail(error)
    return pending


class Opened:
    """A master's sessions on a node, by stage: what it tells the node when it is back there, so that others are given up."""

    def __init__(self) -> None:
        self._sessions: set[tuple[int, int]] = set()
        self._lock = threading.Lock()

    def add(self, stage: int, session: int) -> None:
        with self._lock:
            self._sessions.add((stage, session))

    def drop(self, stage: int, session: int) -> None:
        with self._lock:
            self._sessions.discard((stage, session))

    def listed(self) -> list[tuple[int, int]]:
        with self._lock:
            return sorted(self._sessions)


class Peer(Protocol):
    """A remote node as a stage sees it: its current link, or the error that says why there is none."""

    name: str
    opened: Opened

    def link(self) -> Link: ...

    def wait_up(self, timeout: float) -> Link: ...

    def memory_of(self, layers: tuple[str, ...]) -> Memory: ...


CONTROL_TIMEOUT = 30.0
"""Seconds for an answer to OPEN with a parent, TRUNCATE and the like, which wait behind at most a few batches."""


def _answer(future: Future[tuple[Message, memoryview]], node: str) -> Message:
    """The answer to a control request. Raises NodeLost when none comes in time."""
    try:
        return future.result(CONTROL_TIMEOUT)[0]
    except TimeoutError:
        raise NodeLost(f"{node} has not answered for {CONTROL_TIMEOUT:g} s; it is stuck", node) from None


class RemoteStage:
    """Contiguous layers on a worker. Opening an empty session and closing one cost no round trip: an error of theirs comes
    with the next batch, which the worker serves after them. `link` None: whichever link the peer has at each call."""

    def __init__(self, peer: Peer, index: int, layers: tuple[str, ...], link: Link | None = None) -> None:
        self.node = peer.name
        self.layers = layers
        self.runs_ahead = False
        self.index = index
        self._peer = peer
        self._link = link
        self._opening: list[Future[tuple[Message, memoryview]]] = []

    @property
    def link(self) -> Link:
        """Raises NodeError when there is none."""
        return self._link or self._peer.link()

    def bound(self) -> RemoteStage:
        return RemoteStage(self._peer, self.index, self.layers, self._peer.link())

    def open(self, session: int, spec: SessionSpec, parent: int | None = None, length: int = 0) -> int:
        fields = {"session": session, "spec": spec_to_fields(spec), "parent": parent, "length": length}
        self._peer.opened.add(self.index, session)
        if parent is None:
            self.link.tell(Type.OPEN, fields, self.index)
            return 0
        message = _answer(self.link.ask(Type.OPEN, fields, self.index), self.node)
        return int(message.fields["length"])

    def open_early(self, session: int, spec: SessionSpec) -> None:
        """As `open` of an empty session, but `settle` can tell when it is open: its batches come another way."""
        fields = {"session": session, "spec": spec_to_fields(spec), "parent": None, "length": 0}
        self._peer.opened.add(self.index, session)
        self._opening.append(self.link.ask(Type.OPEN, fields, self.index))

    def settle(self) -> None:
        """Waits for what was opened early. One that failed is told by its first batch."""
        if not self._opening:
            return
        opening, self._opening = self._opening, []
        if wait(opening, CONTROL_TIMEOUT).not_done:
            raise NodeLost(f"{self.node} has not answered for {CONTROL_TIMEOUT:g} s; it is stuck", self.node)

    def submit(self, batch: Batch) -> Pending:
        try:
            return self.link.forward(self.index, batch)
        except CakeError as error:
            return _failed(error)

    def truncate(self, session: int, length: int) -> int:
        fields = {"session": session, "length": length}
        message = _answer(self.link.ask(Type.TRUNCATE, fields, self.index), self.node)
        return int(message.fields["length"])

    def close(self, session: int) -> None:
        """Over the link there is now: what lived on one that fell is kept for us a while."""
        self._peer.opened.drop(self.index, session)
        try:
            link = self._link if self._link is not None and self._link.up else self._peer.link()
            link.tell(Type.CLOSE, {"session": session}, self.index)
        except CakeError:
            return  # it learns of that when we are back, or gives it up by itself

    def memory(self) -> Memory:
        return self._peer.memory_of(self.layers)
