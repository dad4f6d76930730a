"""Puts a model together: plan, connect, compare, load, and an engine over it. What `cake run` and `cake serve` open."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from cake_core.chain import Router, Way
from cake_core.checkpoint import Checkpoint
from cake_core.cluster import Dial, NodeStatus, RemoteNode, describe_missing
from cake_core.engine.drafter import load_drafter
from cake_core.engine.image import ImageEngine
from cake_core.engine.limits import fitting_limits
from cake_core.engine.pipeline import Pipeline
from cake_core.engine.scheduler import Limits
from cake_core.engine.speculation import Speculation
from cake_core.engine.speculator import Speculator
from cake_core.engine.text import TextEngine
from cake_core.errors import CakeError, ConfigError, NodeLost
from cake_core.events import NodeEvent
from cake_core.expectation import Expectation
from cake_core.link import LinkTiming
from cake_core.model import Component, ImageBackend, LoadOptions, Memory, ModelInfo, TextBackend, Tokenizer
from cake_core.placement import Placement
from cake_core.plugins import Plugins
from cake_core.stages import LocalStage, RemoteComponent, RemoteStage, Stage
from cake_core.topology import MASTER, Topology
from cake_core.transport import Address, Channel

log = logging.getLogger(__name__)

NodeProgress = Callable[[str, int, int], None]
"""`progress(what, done, total)` in bytes."""


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What to open and how.

    Attributes:
        dial: `dial(address, timeout)` gives an authenticated channel to a worker (cake_core.connect).
        joined: `joined(name, timeout)` the same for a worker without a host, which dials the master.
        wait: seconds to wait for workers at the start. rejoin: seconds a running request waits for a lost worker.
        wire_dtype: dtype of hidden states between nodes; empty for each stage's own.
        speculation: how tokens are guessed, None for not at all. draft: a model to guess with, loaded on this node.
        limits: None for what fits the placement.
        route: whether workers answer the master (star) or hand over to one another (chain); auto: where they can.
    """

    checkpoint: Checkpoint
    topology: Topology
    options: LoadOptions = field(default_factory=LoadOptions)
    dial: Callable[[Address, float], Channel] | None = None
    joined: Callable[[str, float], Channel] | None = None
    wait: float = 0.0
    rejoin: float = 30.0
    wire_dtype: str = ""
    speculation: Speculation | None = None
    draft: Checkpoint | None = None
    limits: Limits | None = None
    route: Way = "auto"
    timing: LinkTiming | None = None
    progress: NodeProgress | None = None


class Nodes:
    """The workers of a placement, and the watch the engine keeps on them."""

    def __init__(self, spec: RunSpec, plugins: Plugins, info: ModelInfo, placement: Placement) -> None:
        self.rejoin = spec.rejoin
        self._plugins = plugins
        self._listeners: list[Callable[[], None]] = []
        self._states: dict[str, str] = {}
        self._nodes: dict[str, RemoteNode] = {}
        for name in placement.nodes:
            if name != MASTER:
                self._nodes[name] = _remote_node(spec, info, placement, name, self._changed)

    def __getitem__(self, name: str) -> RemoteNode:
        return self._nodes[name]

    def connect(self, wait: float) -> None:
        """Connects to all, waiting up to `wait` seconds. Raises what keeps the first missing one away."""
        for node in self._nodes.values():
            node.start()
        until = time.monotonic() + max(wait, 5.0 if self._nodes else 0.0)
        for node in self._nodes.values():
            node.wait_up(until - time.monotonic() if wait else 0.0 if node.error else until - time.monotonic())

    @property
    def draining(self) -> bool:
        return any(node.state == "draining" for node in self._nodes.values())

    def missing(self) -> CakeError | None:
        away = [node for node in self._nodes.values() if node.state not in ("up", "draining")]
        if not away:
            return None
        return NodeLost(f"missing: {describe_missing(away)}; restart it there", away[0].name, away[0].address)

    def statuses(self) -> list[NodeStatus]:
        return [node.status() for node in self._nodes.values()]

    def listen(self, callback: Callable[[], None]) -> None:
        """Has `callback` called, from any thread, whenever a node changes its state."""
        self._listeners.append(callback)

    def close(self) -> None:
        for node in self._nodes.values():
            node.close()

    def _changed(self, node: RemoteNode) -> None:
        state = node.state
        if self._states.get(node.name) != state and state != "connecting":
            self._states[node.name] = state
            self._plugins.emit(NodeEvent(node.name, state, node.address, str(node.error or "")))
        for callback in self._listeners:
            callback()


def _remote_node(
    spec: RunSpec, info: ModelInfo, placement: Placement, name: str, changed: Callable[[RemoteNode], None]
) -> RemoteNode:
    stages = tuple(span.layers for span in placement.spans if name in span.nodes)
    # A master whose components are all elsewhere may have a folder without weights, which has no tensors to ask for.
    known = any(info.layer(layer).tensors for stage in stages for layer in stage)
    tensors = spec.checkpoint.tensors if known else {}
    fingerprints = {}
    for layer in (layer for stage in stages for layer in stage):
        names = info.layer(layer).tensors
        if names and all(tensor in tensors for tensor in names):
            fingerprints[layer] = spec.checkpoint.fingerprint(names)[:32]
    expectation = Expectation(info.model_type, stages, info.identity, fingerprints)
    host = spec.topology.node(name).host
    return RemoteNode(name, str(host or "joining"), _dial(spec, name, host), expectation, changed, spec.timing)


def _dial(spec: RunSpec, name: str, host: Address | None) -> Dial:
    dial, joined = spec.dial, spec.joined
    if host is not None and dial is not None:
        return lambda timeout: dial(host, timeout)
    if joined is None:
        raise ConfigError(f"node {name!r} has no host in {spec.topology.source or 'the topology'}; add host: 'address:port'")
    return lambda timeout: joined(name, timeout)


@dataclass(slots=True)
class TextRuntime:
    info: ModelInfo
    placement: Placement
    tokenizer: Tokenizer
    engine: TextEngine
    pipeline: Pipeline
    _nodes: Nodes
    _local: Sequence[LocalStage]

    def nodes(self) -> list[NodeStatus]:
        return self._nodes.statuses()

    def missing(self) -> CakeError | None:
        """Which node is not there, if one is not."""
        return self._nodes.missing()

    def memory(self) -> list[Memory]:
        """Of the stages on this node."""
        return [stage.memory() for stage in self._local]

    def close(self) -> None:
        """Ends the engine, the links and the local stages. Idempotent."""
        self.engine.close()
        self._nodes.close()
        local, self._local = self._local, ()
        for stage in local:
            stage.shutdown()


@dataclass(slots=True)
class ImageRuntime:
    info: ModelInfo
    placement: Placement
    engine: ImageEngine
    _nodes: Nodes
    _local: Sequence[Component]
    _shutdown: Callable[[], None]

    def nodes(self) -> list[NodeStatus]:
        return self._nodes.statuses()

    def missing(self) -> CakeError | None:
        """Which node is not there, if one is not."""
        return self._nodes.missing()

    def memory(self) -> list[Memory]:
        """Of the components on this node."""
        return [component.memory() for component in self._local]

    def close(self) -> None:
        self.engine.close()
        self._shutdown()
        self._nodes.close()
        local, self._local = self._local, ()
        for component in local:
            component.shutdown()


def open_text(plugins: Plugins, spec: RunSpec) -> TextRuntime:
    """Connects first and loads then, so a mistake in the cluster is told before minutes of loading."""
    backend = cast("TextBackend", plugins.backend_for(spec.checkpoint, "text"))
    info = backend.describe(spec.checkpoint, spec.options)
    placement = plugins.plan(info, spec.topology)
    nodes = Nodes(spec, plugins, info, placement)
    local: list[LocalStage] = []
    try:
        nodes.connect(spec.wait)
        stages: list[Stage] = []
        indices: dict[str, int] = {}
        for span in placement.spans:
            if span.node == MASTER:
                stage = LocalStage(MASTER, backend.load(spec.checkpoint, info, span.layers, spec.options, _bound(spec, span)))
                local.append(stage)
                stages.append(stage)
            else:
                index = indices.get(span.node, 0)
                indices[span.node] = index + 1
                stages.append(RemoteStage(nodes[span.node], index, span.layers))
        tokenizer = backend.tokenizer(spec.checkpoint)
        router = Router(stages, spec.route, {node.name: node.host for node in spec.topology.nodes})
        pipeline = Pipeline(stages, spec.wire_dtype, router)
        router.require(pipeline.route())
        speculator = Speculator(spec.speculation) if spec.speculation else None
        if speculator is not None and spec.draft is not None:
            speculator.drafter = load_drafter(plugins, spec.draft, spec.options, tokenizer)
            local.append(speculator.drafter.stage)
        engine = TextEngine(info, tokenizer, pipeline, spec.limits or fitting_limits(stages), nodes, speculator)
    except BaseException:
        nodes.close()
        for stage in local:
            stage.shutdown()
        raise
    nodes.listen(engine.wake)
    return TextRuntime(info, placement, tokenizer, engine, pipeline, nodes, local)


def open_image(plugins: Plugins, spec: RunSpec) -> ImageRuntime:
    """As `open_text`, for an image model: components instead of stages, replicas allowed."""
    backend = cast("ImageBackend", plugins.backend_for(spec.checkpoint, "image"))
    info = backend.describe(spec.checkpoint, spec.options)
    placement = plugins.plan(info, spec.topology)
    nodes = Nodes(spec, plugins, info, placement)
    local: list[Component] = []
    try:
        nodes.connect(spec.wait)
        components: dict[str, Sequence[Component]] = {}
        for span in placement.spans:
            layer = span.layers[0]
            if span.node == MASTER:
                component = backend.load(spec.checkpoint, info, layer, spec.options, _bound(spec, span))
                local.append(component)
                components[layer] = [component]
            else:
                # With replicas it is the backend that goes on elsewhere, at once.
                rejoin = spec.rejoin if len(span.nodes) == 1 else 0.0
                components[layer] = [RemoteComponent(nodes[name], layer, rejoin) for name in span.nodes]
        model = backend.assemble(spec.checkpoint, info, components, spec.options)
    except BaseException:
        nodes.close()
        for component in local:
            component.shutdown()
        raise
    return ImageRuntime(info, placement, ImageEngine(info, model), nodes, local, model.shutdown)


def _bound(spec: RunSpec, span: Any) -> Callable[[int, int], None] | None:
    progress = spec.progress
    if progress is None:
        return None
    return lambda done, total: progress(", ".join(span.layers), done, total)
