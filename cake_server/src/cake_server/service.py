"""What the routes share: the runtime once there is one, why there is none, and the jobs in flight."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from cake_core.errors import CakeError, RequestError
from cake_core.links.reports import NodeStatus
from cake_core.model import ModelInfo
from cake_core.runtime import ImageRuntime, TextRuntime
from cake_server.bridge import Courier, Engine, Job
from cake_server.errors import ApiError, unavailable
from cake_server.metrics import Metrics
from cake_server.settings import Settings

R = TypeVar("R")
Runtime = TextRuntime | ImageRuntime
State = Literal["loading", "ready", "failed", "stopping"]


class Service:
    """One per server. `text()` and `image()` are the only doors to a runtime; both raise what the client should read."""

    def __init__(self, settings: Settings, name: str = "") -> None:
        self.settings = settings
        self.metrics = Metrics(self)
        self.state: State = "loading"
        self.detail = "the model is being loaded"
        self.progress: dict[str, tuple[int, int]] = {}
        self.created = int(time.time())
        self.jobs: dict[str, Job[Any, Any]] = {}
        self._name = name
        self._runtime: Runtime | None = None
        self._fingerprint = ""
        self._courier: Courier | None = None

    # The life of the server

    def loading(self, detail: str) -> None:
        """Says what is being waited for. Callable from any thread."""
        self.detail = detail

    def loaded(self, node: str, done: int, total: int) -> None:
        """Progress of one node, in bytes. Callable from any thread."""
        self.progress[node] = (done, total)

    def ready(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._fingerprint = _fingerprint(runtime)
        self.state, self.detail = "ready", ""

    def failed(self, error: BaseException) -> None:
        self.state, self.detail = "failed", str(error)

    def stop(self) -> None:
        """Refuses new requests and ends those in flight with an error that says so."""
        self.state, self.detail = "stopping", "the server is shutting down"
        for job in list(self.jobs.values()):
            job.abort(unavailable("the server is shutting down", "shutting_down"))

    # What is served

    @property
    def runtime(self) -> Runtime | None:
        return self._runtime

    @property
    def info(self) -> ModelInfo | None:
        return None if self._runtime is None else self._runtime.info

    @property
    def model(self) -> str:
        """The name clients see."""
        return self._name or (self._runtime.info.name if self._runtime is not None else "")

    @property
    def names(self) -> tuple[str, ...]:
        return (self.model, *self.settings.aliases)

    @property
    def fingerprint(self) -> str:
        """Changes with whatever may change the text that a seed gives: model, dtype, placement."""
        return self._fingerprint

    def nodes(self) -> Sequence[NodeStatus]:
        return () if self._runtime is None else self._runtime.nodes()

    def missing(self) -> CakeError | None:
        """What keeps the cluster from being whole, if something does. Requests wait for it as long as the engine does."""
        return None if self._runtime is None else self._runtime.missing()

    def check_ready(self) -> Runtime:
        if self._runtime is None or self.state != "ready":
            code = {"failed": "model_failed", "stopping": "shutting_down"}.get(self.state, "model_loading")
            error = unavailable(f"Loading model: {self.detail}" if code == "model_loading" else self.detail, code)
            if self.state == "failed":
                error.headers["x-should-retry"] = "false"
            raise error
        return self._runtime

    def check_model(self, name: str | None) -> None:
        """Raises 404 for a model this server does not have. No name, or an empty one, is the one it has."""
        if name and name not in self.names:
            raise ApiError(
                404, f"The model {name!r} does not exist; this server has {self.model!r}", "model_not_found", "model"
            )

    def text(self, name: str | None = None) -> TextRuntime:
        runtime = self._usable(name)
        if not isinstance(runtime, TextRuntime):
            raise ApiError(501, f"{self.model} makes images; use /v1/images/generations", "wrong_model_type", "model")
        return runtime

    def image(self, name: str | None = None) -> ImageRuntime:
        runtime = self._usable(name)
        if not isinstance(runtime, ImageRuntime):
            raise ApiError(501, f"{self.model} generates text; use /v1/chat/completions", "wrong_model_type", "model")
        return runtime

    def _usable(self, name: str | None) -> Runtime:
        runtime = self.check_ready()
        self.check_model(name)
        return runtime

    # Jobs

    def submit(self, key: str, engine: Engine[R], requests: Sequence[R]) -> Job[R, Any]:
        """Starts a job under the id its response carries; `release` it when it has been answered."""
        if len(self.jobs) >= self.settings.max_requests:
            headers = {"retry-after": "1"}
            raise ApiError(429, f"{len(self.jobs)} requests are being served already; try again", "queue_full", headers=headers)
        if len(requests) > self.settings.max_choices:
            raise RequestError(f"at most {self.settings.max_choices} answers in one request, not {len(requests)}", "n")
        if self._courier is None:
            self._courier = Courier(asyncio.get_running_loop())
        job: Job[R, Any] = Job(engine, requests, self._courier, self.settings.max_unread)
        self.jobs[key] = job
        return job

    def release(self, key: str) -> None:
        """Forgets a job and cancels whatever of it still runs."""
        job = self.jobs.pop(key, None)
        if job is not None:
            job.cancel()

    def cancel(self, key: str, error: CakeError) -> bool:
        job = self.jobs.get(key)
        if job is None:
            return False
        job.abort(error)
        return True

    def status(self) -> Mapping[str, Any]:
        """For /health: `ok`, or what is missing."""
        if self.state != "ready":
            return {"status": self.state, "detail": self.detail}
        missing = self.missing()
        if missing is None:
            return {"status": "ok", "model": self.model}
        return {"status": "degraded", "model": self.model, "detail": str(missing)}


def _fingerprint(runtime: Runtime) -> str:
    info = runtime.info
    parts = [info.name, info.architecture, info.dtype, repr(info.identity), repr(runtime.placement.spans)]
    return f"fp_{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:12]}"
