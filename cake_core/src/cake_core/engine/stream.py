"""A submitted request as an iterator over its events."""

from __future__ import annotations

import queue
from collections.abc import Callable, Generator, Sequence
from typing import Protocol, TypeVar

from cake_core.events import Failed, Finished

E = TypeVar("E")


class Cancellable(Protocol):
    def cancel(self) -> None: ...


def events_of(submit: Callable[[Callable[[Sequence[E]], None]], Cancellable]) -> Generator[E, None, None]:
    """Submits with a sink of its own at the first step; ends with the Finished, raises the error of a Failed, and cancels
    when it is closed before."""
    events: queue.SimpleQueue[Sequence[E]] = queue.SimpleQueue()
    handle = submit(events.put)
    ended = False
    try:
        while not ended:
            for event in events.get():
                ended = isinstance(event, Finished | Failed)
                if isinstance(event, Failed):
                    raise event.error
                yield event
    finally:
        if not ended:
            handle.cancel()
