"""Puts a model together: plan, connect, compare, load, and an engine over it. What `cake run` and `cake serve` open."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from cake_core.checkpoint import Checkpoint
from cake_core.cluster.chain import Router, Way
from cake_core.cluster.nodes import Nodes
from cake_core.cluster.replan import Cast, Replanner
from cake_core.engine.drafter import load_drafter
from cake_core.engine.image import ImageEngine
from cake_core.engine.limits import fitting_limits
from cake_core.engine.pipeline import Pipeline
from cake_core.engine.scheduler import Limits
from cake_core.engine.speculation import Speculation
from cake_core.engine.speculator import Speculator
from cake_core.engine.text import TextEngine
from cake_core.errors import CakeError
from cake_core.links.link import LinkTiming
from cake_core.links.reports import NodeStatus, StageCount
from cake_core.model import Component, ImageBackend, LoadOptions, Memory, ModelInfo, TextBackend, Tokenizer
from cake_core.placement import Placement, Span
from cake_core.plugins import Plugins
from cake_core.profiles import NodeProfile
from cake_core.stages.component import RemoteComponent
from cake_core.stages.devices import component_options, load_text
from cake_core.stages.stage import LocalStage, RemoteStage, Stage
from cake_core.topology import MASTER, Node, Topology
from cake_core.transport import Address, Channel

log = logging.getLogger(__name__)

NodeProgress = Callable[[str, int, int], None]
"""`progress(what, done, total)` in bytes."""


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What to open and how.

    Attributes:
        dial: `dial(address, timeout)` gives an authenticated channel to a worker (cake_core.links.connect).
        joined: `joined(name, timeout)` the same for a worker without a host, which dials the master.
        wait: seconds to wait for workers at the start. rejoin: seconds a running request waits for a lost worker.
        wire_dtype: dtype of hidden states between nodes; empty for each stage's own.
        speculation: how tokens are guessed, None for not at all. draft: a model to guess with, loaded on this node.
        limits: None for what fits the placement.
        on_loss: whether the layers of a lost node wait for it or are placed again on others: workers of the topology that
            brought none of their own, `spares`, and this node as far as `profile(backend)` says what it has free.
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
    on_loss: Literal["wait", "replan"] = "wait"
    spares: tuple[Node, ...] = ()
    profile: Callable[[str], NodeProfile] | None = None
    timing: LinkTiming | None = None
    progress: NodeProgress | None = None


@dataclass(slots=True)
class TextRuntime:
    info: ModelInfo
    placement: Placement
    tokenizer: Tokenizer
    engine: TextEngine
    pipeline: Pipeline
    _nodes: Nodes
    _local: Sequence[LocalStage]
    _replanner: Replanner | None = None

    def recast(self, cast: Cast) -> None:
        """The layers of a lost node were placed again."""
        self.placement, self._local = cast.placement, cast.local

    def nodes(self, fresh: bool = False) -> list[NodeStatus]:
        """`fresh`: as they are now, for which each is asked; else as they were last heard of."""
        return self._nodes.statuses(fresh)

    def parts(self, fresh: bool = False) -> Iterator[tuple[Span, StageCount, Memory]]:
        """Every stage that is heard of, wherever it is, with its work and its memory, in order of execution."""
        known = {status.name: iter(zip(status.work, status.memory, strict=False)) for status in self.nodes(fresh)}
        known[MASTER] = iter(zip(self.work(), self.memory(), strict=False))
        for span in self.placement.spans:
            part = next(known.get(span.node, iter(())), None)
            if part is not None:
                yield span, *part

    def missing(self) -> CakeError | None:
        """Which node is not there, if one is not."""
        return self._nodes.missing()

    def memory(self) -> list[Memory]:
        """Of the stages on this node."""
        return [stage.memory() for stage in self._local]

    def work(self) -> list[StageCount]:
        """Of the stages on this node."""
        return [stage.clock.count for stage in self._local]

    def close(self) -> None:
        """Ends the engine, the links and the local stages. Idempotent."""
        if self._replanner is not None:
            self._replanner.close()
        self.engine.close()
        self._nodes.close()
        if self._replanner is not None:
            self._replanner.join()
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
                loaded = load_text(backend, spec.checkpoint, info, span.layers, spec.options, _bound(spec, span))
                stage = LocalStage(MASTER, loaded)
                local.append(stage)
                stages.append(stage)
            else:
                index = indices.get(span.node, 0)
                indices[span.node] = index + 1
                stages.append(RemoteStage(nodes[span.node], index, span.layers))
        tokenizer = backend.tokenizer(spec.checkpoint)
        nodes.wait_loaded()
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
    runtime = TextRuntime(info, placement, tokenizer, engine, pipeline, nodes, local)
    if spec.on_loss == "replan":

        def load(layers: tuple[str, ...]) -> LocalStage:
            return LocalStage(MASTER, load_text(backend, spec.checkpoint, info, layers, spec.options))

        runtime._replanner = Replanner(plugins, info, nodes, Cast(spec, placement, local), load, runtime.recast)
        runtime._replanner.start(engine)
    return runtime


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
                options = component_options(spec.options, len(local))
                component = backend.load(spec.checkpoint, info, layer, options, _bound(spec, span))
                local.append(component)
                components[layer] = [component]
            else:
                # With replicas it is the backend that goes on elsewhere, at once.
                waits = len(span.nodes) == 1
                components[layer] = [RemoteComponent(nodes[name], layer, spec.rejoin, waits) for name in span.nodes]
        nodes.wait_loaded()
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
