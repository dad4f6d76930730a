"""Fetches the pieces that are missing from whoever has them, over as many links as there are, a few at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Protocol

from cake_core.errors import CakeError, CheckpointError, NodeLost
from cake_core.weights.manifest import FileSpec, by_name
from cake_core.weights.store import Incoming, Store

log = logging.getLogger(__name__)

IN_FLIGHT = 4
"""Pieces on their way at once, over all sources: what a killed transfer gets a second time."""
SLOTS = 2
"""Pieces on their way at once from one source, so that its link never idles for a round trip."""
STRIKES = 3
"""Damaged or refused pieces after which a source is not asked any more."""

Report = Callable[[int, int], None]
"""`report(done, total)` in bytes."""


def _unreported(_done: int, _total: int) -> None:
    """Where nobody wants to know."""


class Source(Protocol):
    """Somebody who has files: `fetch` blocks for one piece and returns its hash and its bytes, or raises a CakeError."""

    name: str

    def has(self, file: str) -> bool: ...

    def fetch(self, file: str, piece: int) -> tuple[bytes, memoryview]: ...


class Transfer:
    """One fetch of a manifest's files into a store. `received` counts bytes of pieces, also those thrown away."""

    def __init__(self, store: Store, files: Sequence[FileSpec]) -> None:
        self.received = 0
        self._store = store
        self._files = by_name(files)
        self._incoming: dict[str, Incoming | None] = {}
        self.report: Report = _unreported
        self._total = sum(file.nbytes for file in self._files.values())
        self._done = 0
        lock = threading.Lock()
        self._changed = threading.Condition(lock)
        self._arrived = threading.Condition(lock)
        self._work: deque[tuple[Incoming, int]] = deque()
        self._left = 0
        self._started = False
        self._error: CakeError | None = None
        self._in_flight = threading.Semaphore(IN_FLIGHT)
        self._sources: list[Source] = []
        self._threads: list[threading.Thread] = []

    def add(self, source: Source) -> None:
        """Another source, before or while `run` runs."""
        with self._changed:
            self._sources.append(source)
            if self._started:
                self._employ(source)

    def cancel(self, error: CakeError) -> None:
        """Has `run` raise."""
        with self._changed:
            self._error = self._error or error
            self._notify()

    def wait(self, name: str, start: int, stop: int) -> None:
        """Returns when bytes start .. stop - 1 of a file are here and checked. Raises what ends the transfer before."""
        with self._changed:
            self._arrived.wait_for(lambda: self._error is not None or self._has(name, start, stop))
            if not self._has(name, start, stop) and self._error is not None:
                raise self._error

    def wait_fronts(self) -> None:
        """The same for what must be there before the files can be opened."""
        for name, file in self._files.items():
            self.wait(name, 0, file.front)

    def run(self) -> int:
        """Fetches what is missing; returns the bytes received. What has come stays, whatever happens.

        Raises NodeLost when no source is left that has what is missing, CapacityError when the disk is full, and the error of
        `cancel`.
        """
        with ExitStack() as held:
            self._plan(held)
            self._tell()
            with self._changed:
                self._started = True
                self._arrived.notify_all()
                for source in self._sources:
                    self._employ(source)
                self._changed.wait_for(lambda: self._error is not None or not self._left or not self._sources)
                error = self._error or (self._lost() if self._left else None)
                self._error = self._error or error or CheckpointError("the transfer has ended")
                self._notify()
            for thread in self._threads:
                thread.join()
            if error is not None:
                raise error
        return self.received

    def _lost(self) -> CakeError:
        return NodeLost("nobody sends the missing weights any more; check the master and the network between")

    def _plan(self, held: ExitStack) -> None:
        """Takes hold of what is not whole, in order of names, so that two processes never wait for each other. What opening
        the files needs comes first, then one file after another."""
        for name, file in sorted(self._files.items()):
            incoming = self._store.incoming(file, self._wait)
            self._incoming[name] = incoming
            self._done += file.nbytes
            if incoming is not None:
                held.callback(incoming.close)
                self._done -= sum(file.piece_length(piece) for piece in incoming.missing)
        wanted = [found for found in map(self._incoming.get, self._files) if found is not None]
        work = [(incoming, piece) for incoming in wanted for piece in incoming.missing]
        work.sort(key=lambda job: job[1] >= job[0].file.front_pieces)
        self._work.extend(work)
        self._left = len(work)

    def _has(self, name: str, start: int, stop: int) -> bool:
        if name not in self._incoming:
            return False
        incoming = self._incoming[name]
        return incoming is None or not incoming.lacks(start, stop)

    def _notify(self) -> None:
        self._changed.notify_all()
        self._arrived.notify_all()

    def _wait(self) -> None:
        """Another process of this machine fetches the same file."""
        if self._error is not None:
            raise self._error
        self._tell()
        time.sleep(0.2)

    def _tell(self) -> None:
        self.report(self._done, self._total)

    def _employ(self, source: Source) -> None:
        if self._error is not None:  # it is over: `run` waits for the threads it knows
            return
        slots = [threading.Thread(target=self._serve, args=(source,), name="cake-fetch", daemon=True) for _ in range(SLOTS)]
        self._threads.extend(slots)
        for thread in slots:
            thread.start()

    def _serve(self, source: Source) -> None:
        strikes = 0
        for incoming, piece in self._jobs(source):
            try:
                with self._in_flight:
                    digest, data = source.fetch(incoming.file.name, piece)
                    self.received += len(data)
                    last = incoming.put(piece, digest, data)
                if last:  # the disk may take its time, and other pieces come meanwhile
                    incoming.finish()
            except OSError as error:
                self.cancel(CheckpointError(f"cannot write to the cache {self._store.folder}: {error.strerror or error}"))
            except CakeError as error:
                log.warning("%s of %s: %s", incoming.file.path, source.name, error)
                strikes += 1
                self._return(incoming, piece)
                if strikes >= STRIKES or not isinstance(error, CheckpointError):
                    self._drop(source)
                    return
            else:
                self._count(incoming.file.piece_length(piece))

    def _jobs(self, source: Source) -> Iterator[tuple[Incoming, int]]:
        """The pieces this source has, as long as there are any to get and it is one of the sources."""
        while True:
            with self._changed:
                job = None
                while job is None:
                    if self._error is not None or not self._left or source not in self._sources:
                        return
                    job = next((job for job in self._work if source.has(job[0].file.name)), None)
                    if job is None:
                        self._changed.wait()
                self._work.remove(job)
            yield job

    def _return(self, incoming: Incoming, piece: int) -> None:
        with self._changed:
            self._work.appendleft((incoming, piece))
            self._changed.notify_all()

    def _drop(self, source: Source) -> None:
        with self._changed:
            if source in self._sources:
                self._sources.remove(source)
            self._changed.notify_all()

    def _count(self, nbytes: int) -> None:
        with self._changed:
            self._done += nbytes
            self._left -= 1
            self._arrived.notify_all()
            if not self._left:
                self._changed.notify_all()
        self._tell()
