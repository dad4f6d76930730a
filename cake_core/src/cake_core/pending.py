"""A batch's result that may come later."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from cake_core.errors import DeadlineExceeded

if TYPE_CHECKING:
    from cake_core.model import Batch


class Pending:
    """A batch under way: the answer of `TextStage.submit`. One producer, any number of readers. `error`: why it failed."""

    __slots__ = ("_callbacks", "_event", "_lock", "_value", "error")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._event: threading.Event | None = None
        self._callbacks: list[Callable[[Pending], None]] | None = []
        self._value: Batch | None = None
        self.error: BaseException | None = None

    @classmethod
    def completed(cls, value: Batch) -> Pending:
        pending = cls()
        pending._value, pending._callbacks = value, None
        return pending

    def done(self) -> bool:
        return self._callbacks is None

    def set(self, value: Batch) -> None:
        """Completes with a value. Callbacks run in this thread. A second completion is ignored."""
        self._finish(value, None)

    def fail(self, error: BaseException) -> None:
        """Completes with an error. A second completion is ignored."""
        self._finish(None, error)

    def _finish(self, value: Batch | None, error: BaseException | None) -> None:
        with self._lock:
            if self._callbacks is None:
                return
            self._value, self.error = value, error
            callbacks, self._callbacks = self._callbacks, None
            if self._event is not None:
                self._event.set()
        for callback in callbacks:
            callback(self)

    def when_done(self, callback: Callable[[Pending], None]) -> None:
        """Calls `callback(self)` once, on completion or at once; it must not block or raise."""
        if self._callbacks is not None:  # once it is done it stays so, and needs no lock
            with self._lock:
                if self._callbacks is not None:
                    self._callbacks.append(callback)
                    return
        callback(self)

    def result(self, timeout: float | None = None) -> Batch:
        """Waits and returns the batch.

        Raises:
            DeadlineExceeded: nothing came within `timeout` seconds.
            CakeError: whatever the stage failed with.
        """
        if self._callbacks is not None:
            self._wait(timeout)
        if self.error is not None:
            raise self.error
        return cast("Batch", self._value)

    def _wait(self, timeout: float | None) -> None:
        with self._lock:
            if self._event is None:
                self._event = threading.Event()
            event, done = self._event, self._callbacks is None
        if not done and not event.wait(timeout):
            raise DeadlineExceeded(f"no result within {timeout} s")
