"""How long to wait before another attempt to reach a node."""

from __future__ import annotations

import random
import threading

FIRST, LAST, REFUSED = 0.1, 5.0, 30.0
"""Seconds between attempts: doubling from the first to the last, with jitter; after a refusal that time cannot mend (wrong
key, wrong model), the long one."""


class Backoff:
    """Waits longer each time, unless `closed` is set."""

    def __init__(self, closed: threading.Event) -> None:
        self._closed = closed
        self._seconds = FIRST

    def wait(self, refused: bool = False) -> None:
        self._closed.wait(REFUSED if refused else self._seconds * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
        self._seconds = min(2 * self._seconds, LAST)
