"""What waits for answers over a link, by the number of its request."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import Future
from dataclasses import dataclass

from cake_core.errors import CakeError
from cake_core.model import Batch, Pending, Row
from cake_core.wire.protocol import CHAINED, Message, Type


@dataclass(frozen=True, slots=True)
class Entry:
    """One request, which a message of type `answer` ends: a batch, whose answer has its own `rows`, or anything else."""

    since: float
    answer: Type
    pending: Pending | None = None
    rows: tuple[Row, ...] = ()
    future: Future[tuple[Message, memoryview]] | None = None

    def complete(self, message: Message, body: memoryview) -> None:
        if self.pending is not None:
            self.pending.set(Batch(self.rows, message.tensors(body)))
        elif self.future is not None:
            self.future.set_result((message, body))

    def fail(self, error: CakeError) -> None:
        if self.pending is not None:
            self.pending.fail(error)
        elif self.future is not None:
            self.future.set_exception(error)


class Waiting:
    """The requests of one link. Those of a chain wait on every link that the chain crosses, under one number, and whichever
    answers first completes them: the others are told to `drop` it."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._entries: dict[int, Entry] = {}
        self._lock = threading.Lock()
        self._closed = False

    def add(self, entry: Entry, number: int | None = None) -> int:
        """The number of the request, a new one unless a chain gave it; 0 once closed."""
        with self._lock:
            if self._closed:
                return 0
            given = 1 + next(self._numbers) % (CHAINED - 1) if number is None else number
            self._entries[given] = entry
            return given

    def take(self, number: int) -> Entry | None:
        """The request of that number, which waits no longer."""
        with self._lock:
            return self._entries.pop(number, None)

    def drop(self, number: int) -> None:
        self.take(number)

    def take_chained(self) -> list[Entry]:
        """Every request that crosses several links."""
        with self._lock:
            numbers = [number for number in self._entries if number & CHAINED]
            return [self._entries.pop(number) for number in numbers]

    def close(self) -> list[Entry]:
        """All that waits; nothing is added any more."""
        with self._lock:
            self._closed = True
            entries, self._entries = self._entries, {}
        return list(entries.values())

    def oldest(self, now: float) -> float:
        """When the request that has waited longest was sent; `now` when none waits."""
        with self._lock:
            return min((entry.since for entry in self._entries.values()), default=now)
