"""Who serves what of a model that runs: the parts that this node loaded, and the way to those on workers. An engine is made of
them, and when the layers of a lost node were placed again, it goes on over the new ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from cake_core.cluster.chain import Router
from cake_core.cluster.nodes import Nodes
from cake_core.engine.text import TextEngine
from cake_core.model import Component, ImageBackend, ModelInfo, Progress, TextBackend
from cake_core.placement import Placement, Span
from cake_core.stages.component import PlacedComponent, RemoteComponent
from cake_core.stages.devices import component_options, load_text
from cake_core.stages.stage import LocalStage, RemoteStage, Stage
from cake_core.topology import MASTER

if TYPE_CHECKING:
    from cake_core.runtime import RunSpec


class Cast(Protocol):
    """What the replanner needs of a model that runs."""

    def load(self, placement: Placement) -> None:
        """Loads what a placement gives this node and is not loaded yet."""

    def enter(self, spec: RunSpec, placement: Placement) -> None:
        """Goes on over a placement all of which is loaded, here and on its workers."""

    def wake(self) -> None:
        """Has who waits for a node look again: a node has changed its state, or the replanner has."""


class Part(Protocol):
    def shutdown(self) -> None: ...


P = TypeVar("P", bound=Part)


class _Parts(Generic[P]):
    """What this node loaded, by the first layer of each part."""

    def __init__(self, spec: RunSpec, info: ModelInfo, nodes: Nodes, placement: Placement) -> None:
        self.spec, self.placement = spec, placement
        self._info, self._nodes = info, nodes
        self._loaded: dict[str, P] = {}

    @property
    def local(self) -> list[P]:
        """The parts in use on this node, in the order of execution."""
        loaded = dict(self._loaded)
        return [loaded[layer] for layer in self.placement.layers_of(MASTER) if layer in loaded]

    def _drop_unless(self, placement: Placement) -> None:
        """Frees what an attempt to place layers again loaded before it failed, unless this one gives it to this node too."""
        layers = placement.layers_of(MASTER)
        for first in [first for first in self._loaded if first not in layers]:
            self._loaded.pop(first).shutdown()

    def _progress(self, layers: Sequence[str]) -> Progress | None:
        report = self.spec.progress
        return None if report is None else lambda done, total: report(", ".join(layers), done, total)

    def close(self) -> None:
        """Frees everything on this node. Idempotent."""
        while self._loaded:
            self._loaded.popitem()[1].shutdown()


class TextCast(_Parts[LocalStage]):
    """The stages of a text model. `engine` is set once it is made of them."""

    def __init__(self, backend: TextBackend, spec: RunSpec, info: ModelInfo, nodes: Nodes, placement: Placement) -> None:
        super().__init__(spec, info, nodes, placement)
        self._backend = backend
        self.engine: TextEngine | None = None

    def load(self, placement: Placement) -> None:
        self._drop_unless(placement)
        spec = self.spec
        for layers in [span.layers for span in placement.spans if span.node == MASTER]:
            for share in self._shares(layers):
                if share[0] not in self._loaded:
                    progress = self._progress(share)
                    stage = load_text(self._backend, spec.checkpoint, self._info, share, spec.options, progress)
                    self._loaded[share[0]] = LocalStage(MASTER, stage)

    def _shares(self, layers: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        """Layers of this node, cut into the stages that are loaded and what lies between these."""
        while layers:
            stage = self._loaded.get(layers[0])
            gap = next((at for at, layer in enumerate(layers) if layer in self._loaded), len(layers))
            length = gap if stage is None else len(stage.layers)
            yield layers[:length]
            layers = layers[length:]

    def stages(self) -> tuple[Stage, ...]:
        """All stages, in the order of execution."""
        stages: list[Stage] = []
        indices: dict[str, int] = {}
        for span in self.placement.spans:
            if span.node == MASTER:
                stages += [self._loaded[share[0]] for share in self._shares(span.layers)]
            else:
                index = indices.get(span.node, 0)
                indices[span.node] = index + 1
                stages.append(RemoteStage(self._nodes[span.node], index, span.layers))
        return tuple(stages)

    def router(self, stages: Sequence[Stage]) -> Router:
        return Router(stages, self.spec.route, {node.name: node.host for node in self.spec.topology.nodes})

    def enter(self, spec: RunSpec, placement: Placement) -> None:
        self.spec, self.placement = spec, placement
        stages = self.stages()
        if self.engine is not None:
            self.engine.restage(stages, self.router(stages))

    def wake(self) -> None:
        if self.engine is not None:
            self.engine.wake()


class ImageCast(_Parts[Component]):
    """The components of an image model. Its engine knows them as places, which stay the same wherever they lead."""

    def __init__(self, backend: ImageBackend, spec: RunSpec, info: ModelInfo, nodes: Nodes, placement: Placement) -> None:
        super().__init__(spec, info, nodes, placement)
        self._backend = backend
        self._placed: dict[str, list[PlacedComponent]] = {}

    def load(self, placement: Placement) -> None:
        self._drop_unless(placement)
        spec = self.spec
        for layer in placement.layers_of(MASTER):
            if layer not in self._loaded:
                options = component_options(spec.options, len(self._loaded))
                self._loaded[layer] = self._backend.load(spec.checkpoint, self._info, layer, options, self._progress([layer]))

    def components(self) -> Mapping[str, Sequence[Component]]:
        """What the model is assembled from: components of this node as they are, the way to those on workers."""
        components: dict[str, Sequence[Component]] = {}
        for span in self.placement.spans:
            layer = span.layers[0]
            if span.node == MASTER:
                components[layer] = [self._loaded[layer]]
            else:
                # With replicas it is the backend that goes on elsewhere, at once.
                waits = len(span.nodes) == 1
                components[layer] = self._placed[layer] = [
                    PlacedComponent(RemoteComponent(self._nodes[node], layer), node, lambda: self._nodes.rejoin, waits)
                    for node in span.nodes
                ]
        return components

    def enter(self, spec: RunSpec, placement: Placement) -> None:
        self.spec, self.placement = spec, placement
        for span in placement.spans:
            self._move(span)

    def _move(self, span: Span) -> None:
        """Leads the ways to a layer to where it is now. Of replicas that were lost together, one was placed again: what led to
        the others leads nowhere from now on."""
        layer = span.layers[0]
        ways = self._placed.get(layer, [])
        fresh = iter([node for node in span.nodes if node not in {way.node for way in ways}])
        for way in ways:
            node = way.node if way.node in span.nodes else next(fresh, None)
            if node == MASTER:
                way.move(self._loaded[layer], MASTER)
            elif node is not None and way.peer is not self._nodes[node]:
                way.move(RemoteComponent(self._nodes[node], layer), node)

    def wake(self) -> None:
        for way in self._ways():
            way.wake()

    def leave(self) -> None:
        """Nobody waits for a node any more."""
        for way in self._ways():
            way.waits = False
            way.wake()

    def _ways(self) -> Iterator[PlacedComponent]:
        for ways in self._placed.values():
            yield from ways
