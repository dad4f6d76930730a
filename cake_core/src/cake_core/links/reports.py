"""What a node tells of its stages: what they have done and what they hold; and how such a report is read."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from cake_core.links.link import LinkCount
from cake_core.model import Memory

T = TypeVar("T")
State = Literal["connecting", "up", "draining", "down"]


@dataclass(slots=True)
class StageCount:
    """What a stage has done since it was loaded. `seconds`: while it had a batch, whichever thread or device computed."""

    batches: int = 0
    positions: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A node at one moment. `since` is the time (time.time()) of the last change of state."""

    name: str
    address: str
    state: State
    layers: tuple[str, ...]
    since: float
    error: str = ""
    memory: tuple[Memory, ...] = ()
    platform: Mapping[str, Any] = field(default_factory=dict)
    count: LinkCount | None = None
    work: tuple[StageCount, ...] = ()
    """Of each of its stages, in order."""


class StageClock:
    """Counts the batches of a stage. Any thread may end one."""

    def __init__(self) -> None:
        self.count = StageCount()
        self._lock = threading.Lock()
        self._until = 0.0

    def ended(self, began: float, positions: int) -> None:
        """Batches under way at once, as on a GPU that runs ahead, are not counted twice."""
        with self._lock:
            now = time.perf_counter()
            self.count.batches += 1
            self.count.positions += positions
            self.count.seconds += now - max(began, self._until)
            self._until = now


def read_memory(values: Any) -> Memory:
    """Memory from a report, whatever a newer worker adds to it."""
    return _known(Memory, {"device": "", "dtype": "", "weights": 0, **(values if isinstance(values, dict) else {})})


def read_count(values: Any) -> StageCount:
    return _known(StageCount, values if isinstance(values, dict) else {})


def _known(kind: type[T], values: dict[str, Any]) -> T:
    """A dataclass of those `values` that it has fields for."""
    names: Iterable[str] = kind.__dataclass_fields__  # type: ignore[attr-defined]
    return kind(**{name: values[name] for name in names if name in values})
