"""Steps under way on a device: completed in the order of their launch, by a thread of their own."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cake_core.errors import CakeError, StageError
from cake_core.model import Batch, Pending
from cake_llama.stage import Step


@dataclass(slots=True)
class Flight:
    """A step under way."""

    batch: Batch
    steps: Sequence[Step]
    pending: Pending
    done: torch.cuda.Event
    host: Tensor | None = None  # tokens or hidden states on their way to the host
    drawn: Sequence[int] = ()  # for each token in `host` the step that it was drawn for
    logits: Tensor | None = None  # kept where a row needs more than a token


class Flights:
    """`result` makes of a flight that has landed what is answered; it runs in the thread that completes it."""

    def __init__(self, device: torch.device, result: Callable[[Flight], Batch]) -> None:
        self._device = device
        self._result = result
        self._queue: queue.SimpleQueue[Flight | None] = queue.SimpleQueue()
        self._landed = threading.Condition()
        self._in_flight = 0
        self._flying: Counter[int] = Counter()
        self._detailed = False
        self._thread = threading.Thread(target=self._land, name="cake-cuda", daemon=True)
        self._thread.start()

    @property
    def detailed(self) -> bool:
        """Whether a step under way says what was drawn only on landing."""
        return self._detailed

    def add(self, flight: Flight, here_if_alone: bool) -> None:
        """Has a launched step completed: by this thread, if it is the only one and that is wanted, or by the flights' own."""
        with self._landed:
            alone = self._in_flight == 0
            self._in_flight += 1
            self._flying.update(row.session for row in flight.batch.rows)
            self._detailed |= flight.logits is not None
        if alone and here_if_alone:
            self._complete(flight)
        else:
            self._queue.put(flight)

    def has(self, session: int) -> bool:
        """Whether a step of this session is under way."""
        with self._landed:
            return self._flying[session] > 0

    def drain(self) -> None:
        """Waits until every step under way has landed."""
        with self._landed:
            self._landed.wait_for(lambda: self._in_flight == 0)
            self._detailed = False

    def close(self) -> None:
        self.drain()
        self._queue.put(None)
        self._thread.join(10.0)

    def _land(self) -> None:
        torch.cuda.set_device(self._device)
        while (flight := self._queue.get()) is not None:
            self._complete(flight)

    def _complete(self, flight: Flight) -> None:
        try:
            flight.done.synchronize()
            with torch.inference_mode():
                result = self._result(flight)
        except Exception as error:
            # Whatever went wrong on the device ends this batch, not the thread that completes all of them.
            text = f"{self._device}: {type(error).__name__}: {error}"
            self._set_down(flight)
            flight.pending.fail(error if isinstance(error, CakeError) else StageError(text))
        else:
            self._set_down(flight)
            flight.pending.set(result)

    def _set_down(self, flight: Flight) -> None:
        with self._landed:
            self._in_flight -= 1
            self._flying.subtract(row.session for row in flight.batch.rows)
            self._landed.notify_all()
