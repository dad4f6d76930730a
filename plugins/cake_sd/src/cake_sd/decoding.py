"""From finished latents to pictures handed on in order: at once, or while the next image is denoised."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from typing import Any

import torch

from cake_core.events import ImageDone
from cake_sd.brush import Brush


class InOrder:
    """Hands finished images on in their order, whichever lane is done first."""

    def __init__(self, emit: Callable[[Any], None]) -> None:
        self._emit = emit
        self._lock = threading.Lock()
        self._waiting: dict[int, ImageDone] = {}
        self._next = 0

    def add(self, images: Sequence[ImageDone]) -> None:
        with self._lock:
            self._waiting |= {image.image: image for image in images}
            while (image := self._waiting.pop(self._next, None)) is not None:
                self._emit(image)
                self._next += 1


class Decoding:
    """One lane's. With `threads`, a picture is decoded by another node while the lane denoises the next: at most one behind,
    and none is under way any more at the end."""

    def __init__(self, order: InOrder, threads: Executor | None) -> None:
        self._order, self._threads = order, threads
        self._pending: Future[None] | None = None

    def __enter__(self) -> Decoding:
        return self

    def add(self, brush: Brush, z: torch.Tensor) -> None:
        """Raises what the decoding of these latents raised, or of those before."""
        if self._threads is None:
            self._order.add(brush.finish(z))
            return
        self._settle()
        self._pending = self._threads.submit(lambda: self._order.add(brush.finish(z)))

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __exit__(self, kind: object, *_rest: object) -> None:
        if kind is None:
            self._settle()
        elif self._pending is not None:
            wait([self._pending])
