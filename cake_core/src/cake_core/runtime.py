"""Puts a model together: plan, connect, compare, load, and an engine over it. What `cake run` and `cake serve` open."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from cake_core.checkpoint import Checkpoint
from cake_core.cluster.cast import Cast, ImageCast, TextCast
from cake_core.cluster.chain import Way
from cake_core.cluster.nodes import Nodes
from cake_core.cluster.replan import Replanner
from cake_core.engine.drafter import Drafter, load_drafter
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
from cake_core.model import ImageBackend, LoadOptions, Memory, ModelInfo, TextBackend, Tokenizer
from cake_core.placement import Placement, Span
from cake_core.plugins import Plugins
from cake_core.profiles import NodeProfile
from cake_core.stages.stage import LocalStage
from cake_core.topology import MASTER, Node, Topology
from cake_core.transport import Address, Channel

NodeProgress = Callable[[str, int, int], None]
"""`progress(what, done, total)` in bytes."""


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What to open and how.

    Attributes:
        dial: `dial(address, timeout)` gives an authenticated channel to a worker (cake_core.links.connect).
        joined: `joined(name, timeout)` the same for a worker without a host, which dials the master.
        joined_again: `joined_again(name, invite, timeout)` one more channel to such a worker, which `invite` asks for it.
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
    joined_again: Callable[[str, Callable[[bytes], object], float], Channel] | None = None
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
    tokenizer: Tokenizer
    engine: TextEngine
    pipeline: Pipeline
    _nodes: Nodes
    _cast: TextCast
    _drafter: Drafter | None = None
    _replanner: Replanner | None = None

    @property
    def placement(self) -> Placement:
        """Of now: layers of a lost node may have been placed again."""
        return self._cast.placement

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
        """Of the stages on this node, a draft model's last."""
        return [stage.memory() for stage in self._local()]

    def work(self) -> list[StageCount]:
        """Of the stages on this node, a draft model's last."""
        return [stage.clock.count for stage in self._local()]

    def _local(self) -> list[LocalStage]:
        return [*self._cast.local, *([self._drafter.stage] if self._drafter is not None else [])]

    def close(self) -> None:
        """Ends the engine, the links and the local stages. Idempotent."""
        if self._replanner is not None:
            self._replanner.close()
        self.engine.close()
        self._nodes.close()
        if self._replanner is not None:
            self._replanner.join()
        self._cast.close()
        drafter, self._drafter = self._drafter, None
        if drafter is not None:
            drafter.stage.shutdown()


@dataclass(slots=True)
class ImageRuntime:
    info: ModelInfo
    engine: ImageEngine
    _nodes: Nodes
    _cast: ImageCast
    _shutdown: Callable[[], None]
    _replanner: Replanner | None = None

    @property
    def placement(self) -> Placement:
        """Of now: components of a lost node may have been placed again."""
        return self._cast.placement

    def nodes(self) -> list[NodeStatus]:
        return self._nodes.statuses()

    def missing(self) -> CakeError | None:
        """Which node is not there, if one is not."""
        return self._nodes.missing()

    def memory(self) -> list[Memory]:
        """Of the components on this node."""
        return [component.memory() for component in self._cast.local]

    def close(self) -> None:
        """Ends the engine, the links and the local components. Idempotent."""
        if self._replanner is not None:
            self._replanner.close()
        self._cast.leave()
        self.engine.close()
        self._shutdown()
        self._nodes.close()
        if self._replanner is not None:
            self._replanner.join()
        self._cast.close()


def open_text(plugins: Plugins, spec: RunSpec) -> TextRuntime:
    """Connects first and loads then, so a mistake in the cluster is told before minutes of loading."""
    backend = typing.cast("TextBackend", plugins.backend_for(spec.checkpoint, "text"))
    info = backend.describe(spec.checkpoint, spec.options)
    placement = plugins.plan(info, spec.topology)
    nodes = Nodes(spec, plugins, info, placement)
    cast = TextCast(backend, spec, info, nodes, placement)
    drafter: Drafter | None = None
    try:
        nodes.connect(spec.wait)
        cast.load(placement)
        tokenizer = backend.tokenizer(spec.checkpoint)
        nodes.wait_loaded()
        stages = cast.stages()
        router = cast.router(stages)
        pipeline = Pipeline(stages, spec.wire_dtype, router)
        router.require(pipeline.route())
        speculator = Speculator(spec.speculation) if spec.speculation else None
        if speculator is not None and spec.draft is not None:
            drafter = speculator.drafter = load_drafter(plugins, spec.draft, spec.options, tokenizer)
        engine = TextEngine(info, tokenizer, pipeline, spec.limits or fitting_limits(stages), nodes, speculator)
    except BaseException:
        nodes.close()
        cast.close()
        if drafter is not None:
            drafter.stage.shutdown()
        raise
    cast.engine = engine
    nodes.listen(cast.wake)
    replanner = _replanner(plugins, info, nodes, spec, cast)
    return TextRuntime(info, tokenizer, engine, pipeline, nodes, cast, drafter, replanner)


def open_image(plugins: Plugins, spec: RunSpec) -> ImageRuntime:
    """As `open_text`, for an image model: components instead of stages, replicas allowed."""
    backend = typing.cast("ImageBackend", plugins.backend_for(spec.checkpoint, "image"))
    info = backend.describe(spec.checkpoint, spec.options)
    placement = plugins.plan(info, spec.topology)
    nodes = Nodes(spec, plugins, info, placement)
    cast = ImageCast(backend, spec, info, nodes, placement)
    try:
        nodes.connect(spec.wait)
        cast.load(placement)
        nodes.wait_loaded()
        model = backend.assemble(spec.checkpoint, info, cast.components(), spec.options)
    except BaseException:
        nodes.close()
        cast.close()
        raise
    nodes.listen(cast.wake)
    replanner = _replanner(plugins, info, nodes, spec, cast)
    return ImageRuntime(info, ImageEngine(info, model), nodes, cast, model.shutdown, replanner)


def _replanner(plugins: Plugins, info: ModelInfo, nodes: Nodes, spec: RunSpec, cast: Cast) -> Replanner | None:
    if spec.on_loss == "wait":
        return None
    replanner = Replanner(plugins, info, nodes, spec, cast)
    replanner.start()
    return replanner
