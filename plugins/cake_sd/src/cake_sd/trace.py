"""A trace of one request in Chrome's format, as the seed's `sd-tracing` wrote: open it in chrome://tracing or Perfetto."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from cake_core.errors import RequestError


class Trace:
    """Collects spans from any thread."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._lock = threading.Lock()
        self._events: list[dict[str, Any]] = []

    def add(self, name: str, started: float, ended: float) -> None:
        """A span between two readings of `time.perf_counter`."""
        event = {
            "name": name, "ph": "X", "pid": 1, "tid": threading.get_native_id(),
            "ts": 1e6 * (started - self._start), "dur": 1e6 * (ended - started),
        }  # fmt: skip
        with self._lock:
            self._events.append(event)

    def write(self, folder: Path) -> Path:
        """Writes `trace-MILLISECONDS.json`. Raises RequestError when the folder cannot be written to."""
        path = folder / f"trace-{time.time_ns() // 1_000_000}.json"
        try:
            path.write_text(json.dumps({"traceEvents": self._events}))
        except OSError as error:
            raise RequestError(f"cannot write the trace {path}: {error.strerror}; leave tracing out", "trace") from error
        return path
