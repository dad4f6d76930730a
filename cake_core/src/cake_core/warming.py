"""What a backend may do while the weights are still on their way: get ready for them, and load those that are here."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import ClassVar, Literal, Protocol, runtime_checkable

from cake_core.model import Backend

log = logging.getLogger(__name__)


@runtime_checkable
class Warmable(Protocol):
    """What a backend may offer beside its contract: it can get ready for `load` before there is a checkpoint."""

    def warm(self) -> None:
        """Imports what `load` will need. Called in a thread, perhaps more than once, perhaps with no `load` to follow."""


@runtime_checkable
class Streaming(Protocol):
    """What a backend may say beside its contract: it can load a model that is not all here. Its `load` has the bytes of tensors
    from `Checkpoint.read_into` alone, which waits for them; it had best take layers in the order in which it is given them."""

    streams: ClassVar[Literal[True]]


IDLE = 5.0
"""Seconds without a master after which a worker gets ready for one."""


class Warming:
    """Warms backends in a thread that starts at once or, with `unless`, unless that says yes when it is called with IDLE.

    `wait` for it before loading: imports of one library in two threads wait for each other anyway, and no import is left
    running when a process ends.
    """

    def __init__(self, backends: Iterable[Backend], unless: Callable[[float], bool] | None = None) -> None:
        self._unless = unless
        self._backends = [backend for backend in backends if isinstance(backend, Warmable)]
        self._thread = threading.Thread(target=self._run, name="cake-warm", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        if self._unless is not None and self._unless(IDLE):
            return
        for backend in self._backends:
            try:
                backend.warm()
            except Exception as error:  # whatever a library does when imported; `load` meets it again and tells the master
                log.info("%s cannot be warmed: %s: %s", type(backend).__name__, type(error).__name__, error)
