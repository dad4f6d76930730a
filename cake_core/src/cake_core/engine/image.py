"""The image engine: one job at a time in one thread, a bounded queue behind it."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

from cake_core.engine.stream import events_of
from cake_core.errors import CakeError, Cancelled, QueueFullError, StageError
from cake_core.events import Failed, Finished, ImageEvent, Usage
from cake_core.model import ImageModel, ModelInfo
from cake_core.requests import ImageRequest

log = logging.getLogger(__name__)

ImageSink = Callable[[Sequence[ImageEvent]], None]

MAX_WAITING = 64


@dataclass(slots=True, eq=False)
class ImageJob:
    """A submitted request; `cancel` ends it within one step."""

    request: ImageRequest
    sink: ImageSink
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self._cancelled.set()

    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def emit(self, event: ImageEvent) -> None:
        self.sink([event])


class ImageEngine:
    """Serves image requests with one model until `close`."""

    def __init__(self, info: ModelInfo, model: ImageModel) -> None:
        self.info = info
        self._model = model
        self._jobs: queue.SimpleQueue[ImageJob | None] = queue.SimpleQueue()
        self._current: ImageJob | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="cake-images", daemon=True)
        self._thread.start()

    def submit(self, request: ImageRequest, sink: ImageSink) -> ImageJob:
        """Queues a job. `sink` is called from the engine's thread and must neither block nor raise; the last event is one
        Finished or Failed. Raises QueueFullError when too many wait."""
        if self._closed.is_set():
            raise Cancelled("the engine is shutting down")
        if self._jobs.qsize() >= MAX_WAITING:
            raise QueueFullError(f"{MAX_WAITING} image jobs are waiting already; try again later")
        job = ImageJob(request, sink)
        self._jobs.put(job)
        return job

    def generate(self, request: ImageRequest) -> Generator[ImageEvent, None, None]:
        """The events of one job. Closing the iterator cancels; a Failed is raised as its error."""
        return events_of(lambda sink: self.submit(request, sink))

    @property
    def model(self) -> ImageModel:
        """The model it serves, for a backend's own measurements."""
        return self._model

    @property
    def waiting(self) -> int:
        return self._jobs.qsize()

    @property
    def running(self) -> bool:
        return self._current is not None

    def close(self) -> None:
        """Cancels everything and ends the thread. Idempotent."""
        self._closed.set()
        job = self._current
        if job is not None:
            job.cancel()
        self._jobs.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(30.0)

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._current = job
            if self._closed.is_set():
                job.cancel()
            self._run(job)
            self._current = None

    def _run(self, job: ImageJob) -> None:
        try:
            if job.cancelled():
                raise Cancelled("cancelled while it waited")
            self._model.generate(job.request, job.emit, job.cancelled)
            end: ImageEvent = Finished("stop", "", Usage(0))
        except Cancelled:
            end = Finished("cancelled", "", Usage(0))
        except CakeError as error:
            end = Failed(error)
        except Exception as error:
            log.exception("an image job failed")
            end = Failed(StageError(f"{type(error).__name__}: {error}"))
        job.emit(end)
