"""GET /api/v1/cluster, and its changes as events: what the page and other tools show of the nodes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from litestar import Response, get

from cake_core import __version__
from cake_core.links.reports import NodeStatus
from cake_core.runtime import TextRuntime
from cake_core.topology import MASTER, compress
from cake_server import sse
from cake_server.routes.common import ERRORS, ServiceOf
from cake_server.schemas.models import ClusterBody, EngineBody, NodeBody, SpanBody
from cake_server.service import Runtime, Service

INTERVAL = 1.0
"""Seconds between two looks at the cluster while somebody watches."""


@get(["/api/v1/cluster", "/api/v1/topology"], responses=ERRORS)
async def cluster(service: ServiceOf) -> ClusterBody:
    """Nodes, what each serves, memory and traffic; also while the model is being loaded."""
    return describe(service)


@get("/api/v1/cluster/events", responses=ERRORS, media_type="text/event-stream")
async def cluster_events(service: ServiceOf) -> Response[Any]:
    """Server-sent events: `cluster` with the body of `/api/v1/cluster`, at once and whenever something changes."""
    watcher = _Watcher(service)
    settings = service.settings
    plan = sse.StreamPlan(
        frames=watcher.frames(),
        wake=watcher.wake,
        leave=watcher.leave,
        release=watcher.leave,
        keep_alive=settings.keep_alive,
        stall_timeout=settings.stall_timeout,
    )
    return sse.EventStream(plan)


class _Watcher:
    """Looks every INTERVAL and tells what is new."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._left = False
        self._woken = asyncio.Event()

    def wake(self) -> None:
        self._woken.set()

    def leave(self) -> None:
        self._left = True
        self._woken.set()

    async def frames(self) -> AsyncIterator[bytes]:
        last = b""
        while not self._left and self._service.state != "stopping":
            frame = sse.event("cluster", describe(self._service))
            yield frame if frame != last else b""
            last = frame
            self._woken.clear()
            try:
                async with asyncio.timeout(INTERVAL):
                    await self._woken.wait()
            except TimeoutError:
                continue


def describe(service: Service) -> ClusterBody:
    status = service.status()
    body = ClusterBody(
        status=status["status"], detail=status.get("detail", ""), version=__version__, requests=len(service.jobs)
    )
    runtime = service.runtime
    if runtime is None:
        body.loading = {name: list(progress) for name, progress in service.progress.items()}
        return body
    info = runtime.info
    body.model, body.model_type, body.architecture = service.model, info.model_type, info.architecture
    body.dtype, body.context_length = info.dtype, info.context_length
    size = {layer.name: layer.nbytes for layer in info.layers}
    body.spans = [
        SpanBody(list(span.nodes), ", ".join(compress(span.layers)), sum(size[layer] for layer in span.layers))
        for span in runtime.placement.spans
    ]
    body.nodes = [_master(runtime, size), *(_node(status, runtime, size) for status in _sorted(runtime))]
    body.engine = _engine(runtime)
    return body


def _sorted(runtime: Runtime) -> Sequence[NodeStatus]:
    order = {name: index for index, name in enumerate(runtime.placement.nodes)}
    return sorted(runtime.nodes(), key=lambda status: order.get(status.name, 0))


def _master(runtime: Runtime, size: dict[str, int]) -> NodeBody:
    layers = runtime.placement.layers_of(MASTER)
    return NodeBody(
        name=MASTER,
        address="",
        state="up",
        layers=compress(layers),
        nbytes=sum(size[layer] for layer in layers),
        memory=[msgspec.to_builtins(memory) for memory in runtime.memory()],
    )


def _node(status: NodeStatus, runtime: Runtime, size: dict[str, int]) -> NodeBody:
    layers = runtime.placement.layers_of(status.name)
    return NodeBody(
        name=status.name,
        address=status.address,
        state=status.state,
        layers=compress(layers),
        nbytes=sum(size[layer] for layer in layers),
        since=status.since,
        error=status.error,
        memory=[msgspec.to_builtins(memory) for memory in status.memory],
        platform=dict(status.platform),
        traffic={} if status.count is None else msgspec.to_builtins(status.count),
    )


def _engine(runtime: Runtime) -> EngineBody:
    if isinstance(runtime, TextRuntime):
        stats = runtime.engine.stats()
        return EngineBody(
            running=stats.running, waiting=stats.waiting, kv_tokens=stats.kv_tokens, kv_tokens_used=stats.kv_tokens_used
        )
    return EngineBody(running=int(runtime.engine.running), waiting=runtime.engine.waiting)
