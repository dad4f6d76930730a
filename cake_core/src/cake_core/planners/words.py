"""A plan in words: why a node is left out, when one machine would do better, and the topology to write down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cake_core.placement import Placement
from cake_core.planners.costs import Costs
from cake_core.planners.fronts import Step
from cake_core.planners.request import Alone, PlannedStage, Prediction
from cake_core.planners.search import MASTER_INDEX
from cake_core.profiles import ClusterProfile
from cake_core.topology import MASTER, Node, Topology
from cake_core.transport import Address


def topology_of(placement: Placement, cluster: ClusterProfile, given: Topology) -> Topology:
    """The placement as a topology: the given nodes keep host and description."""
    known = {node.name: node for node in given.nodes}
    nodes = []
    for name in placement.nodes:
        if name == MASTER:
            continue
        host = cluster.node(name).host
        old = known.get(name) or Node(name, Address.parse(host) if host else None, ())
        models = ", ".join(device.model or device.device for device in cluster.node(name).devices)
        nodes.append(Node(name, old.host, placement.layers_of(name), old.description or models))
    return Topology(tuple(nodes), given.source)


def reasons(costs: Costs, way: Sequence[Step]) -> dict[str, str]:
    """Why each worker that serves nothing is left out."""
    used = {step[0] for step in way}
    found = {}
    layer = _middle(costs)
    nbytes = costs.memory[layer + 1] - costs.memory[layer]
    mean = sum(_each(costs, step, layer) * (step[3] - step[2]) for step in way) / sum(step[3] - step[2] for step in way)
    for index, node in enumerate(costs.nodes):
        if index in used or index == MASTER_INDEX:
            continue
        device = node.devices[0]
        if max(each.room for each in node.devices) < nbytes:
            room = max(each.room for each in node.devices)
            found[node.name] = f"no room: a layer takes {nbytes / 1e6:.0f} MB with its KV cache, it has {room / 1e6:.0f} MB"
            continue
        fixed = device.overhead + costs.hop[MASTER_INDEX][index] + costs.hop[index][MASTER_INDEX]
        each = device.time[layer + 1] - device.time[layer]
        found[node.name] = (
            f"would slow it down: reaching it costs {fixed * 1e3:.2f} ms a token, and a layer takes {each * 1e3:.3f} ms there "
            f"against {mean * 1e3:.3f} ms on the nodes in use"
        )
    return found


def _middle(costs: Costs) -> int:
    """A layer like most."""
    return min(costs.layers // 2, costs.layers - 1)


def _each(costs: Costs, step: Step, layer: int) -> float:
    device = costs.nodes[step[0]].devices[step[1]]
    return device.time[layer + 1] - device.time[layer]


def advice(stages: Sequence[PlannedStage], prediction: Prediction, alone: Alone | None) -> Iterator[str]:
    """Sentences for people."""
    nodes = list(dict.fromkeys(stage.node for stage in stages))
    ours = prediction.seconds_per_token
    if alone is None:
        yield "no machine has room for the whole model: it takes the cluster"
    elif len(nodes) == 1:
        yield f"one machine alone is fastest: {_named(nodes[0])} holds every layer"
    elif alone.prediction.seconds_per_token < ours:
        theirs = alone.prediction.seconds_per_token
        yield (
            f"one machine alone would be faster for one sequence: {_named(alone.node)} with every layer takes "
            f"{theirs * 1e3:.2f} ms a token, this plan {ours * 1e3:.2f} ms"
        )
    for stage in stages:
        if stage.weights + stage.kv > stage.room:
            needed, room = (stage.weights + stage.kv) / 1e9, stage.room / 1e9
            yield (
                f"{_named(stage.node)} needs {needed:.2f} GB on {stage.device} for weights and KV cache and has {room:.2f} GB: "
                "give it fewer layers, or a smaller --context"
            )


def _named(node: str) -> str:
    return "the master" if node == MASTER else node
