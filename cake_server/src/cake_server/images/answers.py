"""The answer of an image job: whole, in the seed's shape, or as events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from cake_core.errors import Cancelled
from cake_core.events import Failed, Finished, ImageDone, ImageEvent, ImagePreview, ImageStep, ImageWarning
from cake_server import sse
from cake_server.bridge import Job
from cake_server.errors import error_body, to_api_error
from cake_server.images.encode import b64, encode
from cake_server.metrics import Metrics
from cake_server.schemas.images import ImageItem, ImageList, ImageProgress, ImageTimings


@dataclass(slots=True)
class ImageAnswer:
    """Reads a job and counts what it took. `kind` names the events: `image_generation` or `image_edit`."""

    job: Job[Any, ImageEvent]
    metrics: Metrics
    created: int
    output_format: str = "png"
    compression: int | None = None
    kind: str = "image_generation"
    partial_images: int = 0
    progress: bool = False
    steps: int = 0
    step_seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    size: str = ""

    async def events(self) -> AsyncIterator[ImageEvent | None]:
        """Events in order; None when the job was woken with nothing new."""
        while self.job.more:
            items = await self.job.get()
            if not items:
                yield None
            for _, event, _ in items:
                self._count(event)
                if not isinstance(event, Finished):
                    yield event
        self.metrics.finished(time.perf_counter() - self.job.started)

    def _count(self, event: ImageEvent) -> None:
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished) and event.reason == "cancelled":
            raise Cancelled("the request was cancelled")
        if isinstance(event, ImageStep):
            self.steps += 1
            self.step_seconds += event.seconds
            self.metrics.image_step.observe(event.seconds)
        elif isinstance(event, ImageWarning):
            self.warnings.append(event.message)
        elif isinstance(event, ImageDone):
            self.metrics.images.inc()
            self.size = f"{event.width}x{event.height}"

    async def file(self, done: ImageDone) -> bytes:
        return await asyncio.to_thread(encode, done, self.output_format, self.compression)

    async def whole(self) -> ImageList:
        items = [
            ImageItem(b64_json=b64(await self.file(event)), seed=event.seed)
            async for event in self.events()
            if isinstance(event, ImageDone)
        ]
        answer = ImageList(
            created=self.created, data=items, output_format=self.output_format, size=self.size, timings=self._timings()
        )
        if self.warnings:
            answer.warnings = self.warnings
        return answer

    async def in_order(self) -> list[str]:
        """The seed's answer: previews and finished images in the order they came."""
        images = []
        async for event in self.events():
            if isinstance(event, ImagePreview):
                images.append(b64(event.png))
            elif isinstance(event, ImageDone):
                images.append(b64(await self.file(event)))
        return images

    async def frames(self) -> AsyncIterator[bytes]:
        shown: dict[int, int] = {}
        async for event in self.events():
            if event is None:
                yield b""
            elif isinstance(event, ImageStep) and self.progress:
                eta = round((event.steps - event.step) * event.seconds * 1000)
                body = ImageProgress(
                    image=event.image, step=event.step, steps=event.steps, s_per_it=round(event.seconds, 4), eta_ms=eta
                )
                yield sse.event(body.type, body)
            elif isinstance(event, ImagePreview) and shown.get(event.image, 0) < self.partial_images:
                index = shown[event.image] = shown.get(event.image, 0) + 1
                yield self._image_event("partial_image", event.png, "png", partial_image_index=index - 1, image=event.image)
            elif isinstance(event, ImageDone):
                data = await self.file(event)
                yield self._image_event("completed", data, self.output_format, image=event.image, seed=event.seed)

    def _image_event(self, name: str, data: bytes, output_format: str, **more: Any) -> bytes:
        kind = f"{self.kind}.{name}"
        body = {
            "type": kind,
            "b64_json": b64(data),
            "created_at": self.created,
            "size": self.size or "auto",
            "quality": "auto",
            "background": "opaque",
            "output_format": output_format,
            **more,
        }
        if name == "completed":
            body["usage"] = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
        return sse.event(kind, body)

    def _timings(self) -> ImageTimings:
        seconds = time.perf_counter() - self.job.started
        return ImageTimings(self.steps, round(seconds, 4), round(self.step_seconds / self.steps, 4) if self.steps else 0.0)


def failed_frames(error: BaseException) -> bytes:
    body = error_body(to_api_error(error))
    return sse.event("error", {"type": "error", **body})
