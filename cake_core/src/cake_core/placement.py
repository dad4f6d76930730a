"""The checked result of fitting a topology to a model: every layer on exactly one node (or on replicas), in order."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from cake_core.errors import TopologyError
from cake_core.model import Layer, ModelInfo
from cake_core.topology import MASTER, Node, Topology, compress


@dataclass(frozen=True, slots=True)
class Span:
    """Contiguous layers on the same nodes: one stage. More than one node only where every layer is stateless (replicas)."""

    nodes: tuple[str, ...]
    layers: tuple[str, ...]

    @property
    def node(self) -> str:
        return self.nodes[0]


@dataclass(frozen=True, slots=True)
class Placement:
    """`spans` cover the model's layers once, in order."""

    spans: tuple[Span, ...]

    def layers_of(self, node: str) -> tuple[str, ...]:
        return tuple(layer for span in self.spans if node in span.nodes for layer in span.layers)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Every node that serves something, in order of first appearance."""
        return tuple(dict.fromkeys(node for span in self.spans for node in span.nodes))

    def table(self, model: ModelInfo) -> list[tuple[str, str, int]]:
        """Rows (node, layers as ranges, bytes), in order of the spans."""
        size = {layer.name: layer.nbytes for layer in model.layers}
        return [
            (node, ", ".join(compress(span.layers)), sum(size[layer] for layer in span.layers))
            for span in self.spans
            for node in span.nodes
        ]


def place(model: ModelInfo, topology: Topology) -> Placement:
    """What the topology says, and everything no node lists on the master.

    Raises TopologyError for a layer the model does not have (with the nearest names) and for one on two nodes that is not
    stateless.
    """
    owners: dict[str, tuple[str, ...]] = {layer.name: () for layer in model.layers}
    for node in topology.nodes:
        for name in node.layers:
            if name not in owners:
                raise TopologyError(_unknown_layer(model, topology, node, name))
            owners[name] = (*owners[name], node.name)
    spans: list[Span] = []
    for layer in model.layers:
        nodes = owners[layer.name] or (MASTER,)
        _check_owners(topology, layer, nodes)
        if spans and spans[-1].nodes == nodes and model.model_type == "text":
            spans[-1] = Span(nodes, (*spans[-1].layers, layer.name))
        else:
            spans.append(Span(nodes, (layer.name,)))
    return Placement(tuple(spans))


def _check_owners(topology: Topology, layer: Layer, nodes: tuple[str, ...]) -> None:
    if len(nodes) > 1 and not layer.stateless:
        raise TopologyError(
            f"{topology.source or 'the topology'}: layer {layer.name!r} is on nodes {' and '.join(map(repr, nodes))}; "
            "it keeps state, so give it to one"
        )


def _unknown_layer(model: ModelInfo, topology: Topology, node: Node, name: str) -> str:
    names = [layer.name for layer in model.layers]
    close = difflib.get_close_matches(name, names, 3, 0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"it has {', '.join(compress(tuple(names)))}"
    return f"{topology.source or 'the topology'}: node {node.name!r} lists {name!r}, which {model.name} does not have; {hint}"


def check_placement(model: ModelInfo, placement: Placement, topology: Topology) -> None:
    """Raises TopologyError unless the spans cover every layer once, in order, on nodes there are."""
    placed = [layer for span in placement.spans for layer in span.layers]
    expected = [layer.name for layer in model.layers]
    if placed != expected:
        missing = [name for name in expected if name not in placed]
        raise TopologyError(f"the placement does not cover the model in order (missing: {', '.join(missing[:5]) or 'none'})")
    known = {MASTER, *(node.name for node in topology.nodes)}
    for span in placement.spans:
        for node in span.nodes:
            if node not in known:
                raise TopologyError(f"the placement names node {node!r}, which the topology does not have")
        for layer in span.layers:
            _check_owners(topology, model.layer(layer), span.nodes)
