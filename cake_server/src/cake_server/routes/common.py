"""What the endpoints that generate share: ids, the job's life, and the two ways to answer."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from litestar import Request, Response
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec

from cake_server import sse
from cake_server.bridge import Engine, Job
from cake_server.edge.record import record_of
from cake_server.schemas.common import ErrorBody
from cake_server.service import Service

AnyRequest = Request[Any, Any, Any]
ServiceOf = NamedDependency[Service]

ERRORS: Mapping[int, ResponseSpec] = {
    status: ResponseSpec(ErrorBody, generate_examples=False, description=text)
    for status, text in {
        400: "The request is wrong; `param` names the field.",
        401: "No API key, or a wrong one.",
        403: "A host or an origin that may not call.",
        404: "No such model.",
        413: "The body is too large.",
        429: "The queue is full; see `Retry-After`.",
        500: "The server failed.",
        501: "The model cannot do this.",
        503: "The model is loading, or a node is missing.",
    }.items()
}


def answers_with(body: type, description: str = "The answer.") -> dict[int, ResponseSpec]:
    """`responses` of a handler: its success, and the errors every one can give."""
    return {200: ResponseSpec(body, generate_examples=False, description=description), **ERRORS}


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(16)}"


@dataclass(frozen=True, slots=True)
class Exchange:
    """One generating request under way. `key` is the id of its response, under which it can be cancelled."""

    request: AnyRequest
    service: Service
    key: str
    job: Job[Any, Any]
    facts: Callable[[], Mapping[str, Any]]

    @classmethod
    def start(cls, request: AnyRequest, service: Service, key: str, engine: Engine[Any], requests: Sequence[Any]) -> Exchange:
        """Admits the job, or raises what the client should read."""
        return cls(request, service, key, service.submit(key, engine, requests), dict)

    def telling(self, facts: Callable[[], Mapping[str, Any]]) -> Exchange:
        """The same, with what its log line says when it ends."""
        return Exchange(self.request, self.service, self.key, self.job, facts)

    def release(self) -> None:
        record_of(self.request.scope).facts.update(self.facts())
        self.service.release(self.key)

    async def whole(self, work: Coroutine[Any, Any, Any], media_type: str | None = None) -> Response[Any]:
        """One answer, JSON unless said otherwise. The job ends with the client's patience: leaving cancels it."""
        try:
            content = await sse.watched(self.request, self.job, work)
            return Response(content, status_code=200, media_type=media_type)
        finally:
            self.release()

    async def stream(
        self, frames: AsyncIterator[bytes], failed: Callable[[BaseException], bytes] = sse.error_frames
    ) -> Response[Any]:
        """An event stream. What fails within the first moments still gets its HTTP status."""
        settings = self.service.settings
        try:
            await self.job.first(settings.first_event_wait)
        except BaseException:
            self.release()
            raise
        plan = sse.StreamPlan(
            frames=frames,
            wake=self.job.wake,
            leave=lambda: self.job.abort(sse.left()),
            release=self.release,
            keep_alive=settings.keep_alive,
            stall_timeout=settings.stall_timeout,
            failed=self._note_failure(failed),
        )
        return sse.EventStream(plan)

    def _note_failure(self, failed: Callable[[BaseException], bytes]) -> Callable[[BaseException], bytes]:
        """The status line has said 200; the log line tells what came after it."""

        def note(error: BaseException) -> bytes:
            record_of(self.request.scope).facts["error"] = str(error)
            return failed(error)

        return note
