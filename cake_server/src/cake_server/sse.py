"""Server-sent events as OpenAI's clients read them: only `data:` lines and comments, nothing else on /v1."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import msgspec
from litestar import Request, Response
from litestar.types import Receive, Scope, Send

from cake_core.errors import Cancelled
from cake_server.bridge import Job
from cake_server.errors import encode_error, to_api_error

T = TypeVar("T")

KEEP_ALIVE = b": keep-alive\n\n"
ABORT = "cake.abort"
"""Scope key of a function that drops the connection at once (set by `serve`)."""
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def data(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def event(name: str, value: Any) -> bytes:
    """A named event: only for our own API and for images, never in a text stream."""
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(value) + b"\n\n"


def error_frames(error: BaseException) -> bytes:
    """What a stream ends with when it fails after its status line has gone out."""
    return b"data: " + encode_error(to_api_error(error)) + b"\n\n" + DONE


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """A stream: where its frames come from, and what happens around it. All callables are quick and synchronous.

    Attributes:
        frames: yields bytes to send; empty ones when woken with nothing to say, which is when a keep-alive goes out.
        wake: makes `frames` yield soon.
        leave: the client has gone: ends `frames`.
        release: runs once, however the stream ends.
        failed: formats an error for this stream's readers.
    """

    frames: AsyncIterator[bytes]
    wake: Callable[[], None]
    leave: Callable[[], None]
    release: Callable[[], None]
    keep_alive: float
    stall_timeout: float
    failed: Callable[[BaseException], bytes] = error_frames


class EventStream(Response[bytes]):
    """A handler's answer that streams. An ASGI application of our own carries it out: it sees the client leave, and its
    clean-up has no `await` that a cancellation could interrupt."""

    def __init__(self, plan: StreamPlan) -> None:
        super().__init__(b"", media_type="text/event-stream")
        self.plan = plan

    def to_asgi_response(self, *_args: Any, **_kwargs: Any) -> Any:
        return _Streamer(self.plan)


class _Streamer:
    def __init__(self, plan: StreamPlan) -> None:
        self._plan = plan
        self._loop = asyncio.get_running_loop()
        self._left = False
        self._sending_since: float | None = None
        self._last_sent = 0.0
        self._abort: Callable[[], None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._abort = cast("dict[str, Any]", scope).get(ABORT)
        watcher = self._loop.create_task(self._watch(receive))
        self._beat()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            try:
                await self._send_frames(send)
            except Exception as error:  # whatever it is, the reader is owed an end it can parse
                if not self._left:
                    await send({"type": "http.response.body", "body": self._plan.failed(error), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._plan.release()
            watcher.cancel()
            if self._timer is not None:
                self._timer.cancel()

    async def _send_frames(self, send: Send) -> None:
        now = self._loop.time
        async for frame in self._plan.frames:
            if not frame:
                if now() - self._last_sent < self._plan.keep_alive / 2:
                    continue
                frame = KEEP_ALIVE
            self._sending_since = self._last_sent = now()
            await send({"type": "http.response.body", "body": frame, "more_body": True})
            self._sending_since = None

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._left = True
        self._plan.leave()

    def _beat(self) -> None:
        """Every `keep_alive` seconds, instead of a timeout around each wait: streams cost nothing while they flow."""
        if self._timer is not None:
            self._plan.wake()
            if self._sending_since is not None and self._loop.time() - self._sending_since > self._plan.stall_timeout:
                # Closing would wait for the client to read what is buffered, which is what it does not do.
                if self._abort is not None:
                    self._abort()
                self._plan.leave()
        self._timer = self._loop.call_later(self._plan.keep_alive, self._beat)


def left() -> Cancelled:
    return Cancelled("the client left")


async def watched(request: Request[Any, Any, Any], job: Job[Any, Any], work: Coroutine[Any, Any, T]) -> T:
    """Runs the work of an answer that does not stream, and aborts its job when the client leaves before it is done."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.abort(left())

    watcher = asyncio.get_running_loop().create_task(watch())
    try:
        return await work
    finally:
        watcher.cancel()
