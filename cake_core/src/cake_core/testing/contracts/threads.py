"""Calls in threads of their own, whose result or error is collected with a time limit: a test that fails never hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar, cast

T = TypeVar("T")

PATIENCE = 20.0
"""Seconds after which something that should have happened has not."""


class Task(Generic[T]):
    """`call()` under way in a daemon thread."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._value: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error

    def running(self, seconds: float) -> bool:
        """Whether it is still under way after so many seconds."""
        self._thread.join(seconds)
        return self._thread.is_alive()

    def result(self, timeout: float = PATIENCE) -> T:
        """What the call returned; raises what it raised, TimeoutError when it goes on."""
        if self.running(timeout):
            raise TimeoutError(f"{self._call} still runs after {timeout} s")
        if self._error is not None:
            raise self._error
        return cast("T", self._value)


def settle(read: Callable[[], int], quiet: float = 0.3) -> int:
    """The value of `read` once it has not changed for `quiet` seconds."""
    end, value, since = time.monotonic() + PATIENCE, read(), time.monotonic()
    while time.monotonic() < end:
        time.sleep(0.02)
        if (now := read()) != value:
            value, since = now, time.monotonic()
        elif time.monotonic() - since > quiet:
            return value
    raise TimeoutError(f"{read} still changes after {PATIENCE} s")
