"""From the engine's thread to the event loop.

The engine calls a sink for every request of a step. Each call only appends to a deque; one `call_soon_threadsafe` then
carries everything that step produced into the loop, however many streams it has. A reader that does not keep up never
holds the engine: what it finds later arrives merged, and beyond a bound its request is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from cake_core.errors import CakeError, QueueFullError
from cake_core.events import Failed, Finished

log = logging.getLogger(__name__)

E = TypeVar("E")
R_contra = TypeVar("R_contra", contravariant=True)
R = TypeVar("R")

WINDOW = 32
"""Requests of one job that are in the engine at once; a batch of a thousand prompts does not fill everybody's queue."""


class Cancellable(Protocol):
    def cancel(self) -> None: ...


class Engine(Protocol[R_contra]):
    """What this module needs of cake_core's TextEngine and ImageEngine."""

    def submit(self, request: R_contra, sink: Callable[[Sequence[Any]], None]) -> Cancellable: ...


class Courier:
    """Carries events from any thread into one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pending: deque[tuple[Callable[[int, Sequence[Any], float], None], int, Sequence[Any], float]] = deque()
        self._scheduled = False

    def deliver(self, target: Callable[[int, Sequence[Any], float], None], index: int, events: Sequence[Any]) -> None:
        """From the engine's thread: `target(index, events, when)` will run in the loop, in order."""
        self._pending.append((target, index, events, time.perf_counter()))
        if self._scheduled:
            return
        self._scheduled = True
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:
            # The loop has closed: whoever would read this is gone too.
            self._pending.clear()

    def _drain(self) -> None:
        # Cleared first: an event appended from here on either is popped below or schedules another run.
        self._scheduled = False
        while self._pending:
            target, index, events, when = self._pending.popleft()
            target(index, events, when)


class Job(Generic[R, E]):
    """The engine requests behind one HTTP request, and their events in one place. Lives in the loop's thread.

    Each event comes as (index of its request, event, time it was made). At most WINDOW requests are in the engine; the rest
    follow as the first ones end, also when the engine's queue is full for a moment. Only a job whose first request is not
    admitted raises QueueFullError.
    """

    def __init__(self, engine: Engine[R], requests: Sequence[R], courier: Courier, max_unread: int) -> None:
        self.started = time.perf_counter()
        self._open = len(requests)
        self._engine = engine
        self._waiting = deque(enumerate(requests))
        self._courier = courier
        self._max_unread = max_unread + 64 * len(requests)
        self._handles: dict[int, Cancellable] = {}
        self._items: list[tuple[int, E, float]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._error: CakeError | None = None
        try:
            self._submit_more()
        except BaseException:
            self.cancel()
            raise

    def _submit_more(self) -> None:
        while self._waiting and len(self._handles) < WINDOW and self._error is None:
            index, request = self._waiting[0]
            try:
                handle = self._engine.submit(request, self._sink(index))
            except QueueFullError:
                if not self._handles:
                    raise
                return
            self._waiting.popleft()
            self._handles[index] = handle

    def _sink(self, index: int) -> Callable[[Sequence[E]], None]:
        deliver, put = self._courier.deliver, self._put
        return lambda events: deliver(put, index, events)

    def _put(self, index: int, events: Sequence[E], when: float) -> None:
        if self._error is not None:
            return
        for event in events:
            self._items.append((index, event, when))
            if isinstance(event, Finished | Failed):
                self._ended(index)
        if len(self._items) > self._max_unread:
            self.abort(CakeError("the client reads too slowly; its request was cancelled"))
        self.wake()

    def _ended(self, index: int) -> None:
        self._open -= 1
        self._handles.pop(index, None)
        if self._waiting:
            try:
                self._submit_more()
            except CakeError as error:
                self.abort(error)

    @property
    def more(self) -> bool:
        """Whether `get` has, or will have, anything to give."""
        return self._open > 0 or bool(self._items)

    async def get(self) -> list[tuple[int, E, float]]:
        """All events since the last call; waits for the first one. An empty list after `wake()`.

        Raises the error the job was aborted with, once everything that came before it was handed out.
        """
        if not self._items and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if not self._items and self._error is not None:
            raise self._error
        items, self._items = self._items, []
        return items

    def wake(self) -> None:
        """Lets a waiting `get` return, if need be with nothing."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def first(self, timeout: float) -> None:
        """Waits for the first event, at most `timeout` seconds, and raises its error if the job failed before any output."""
        timer = asyncio.get_running_loop().call_later(timeout, self.wake)
        try:
            if not self._items:
                self._items = await self.get()
        finally:
            timer.cancel()
        for _, event, _ in self._items:
            if isinstance(event, Failed):
                self.cancel()
                raise event.error

    def cancel(self) -> None:
        """Ends what is still in the engine; safe to call at any time, and more than once."""
        self._waiting.clear()
        handles, self._handles = self._handles, {}
        for handle in handles.values():
            handle.cancel()

    def abort(self, error: CakeError) -> None:
        """Cancels, and lets the reader fail with `error` after what it already has."""
        if self._error is None:
            self._error = error
            self.cancel()
            self.wake()
