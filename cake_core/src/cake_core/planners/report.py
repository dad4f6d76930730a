"""What a way over the nodes will do: seconds a token, tokens a second, seconds to the first token."""

from __future__ import annotations

from collections.abc import Sequence

from cake_core.model import ModelInfo
from cake_core.placement import Placement, Span
from cake_core.planners.costs import Costs
from cake_core.planners.fronts import Step
from cake_core.planners.request import PlannedStage, PlanRequest, Prediction
from cake_core.planners.search import MASTER_INDEX
from cake_core.planners.throughput import period_of
from cake_core.profiles import ClusterProfile


def predict_steps(info: ModelInfo, costs: Costs, cluster: ClusterProfile, ask: PlanRequest, way: Sequence[Step]) -> Prediction:
    """The prediction for a way; its seconds a token are what the search minimised."""
    return Prediction(
        seconds_per_token=step_seconds(costs, way),
        tokens_per_second=costs.rows / period_of(costs, way),
        seconds_to_first=_first_seconds(info, costs, cluster, ask, way),
    )


def step_seconds(costs: Costs, way: Sequence[Step]) -> float:
    """Seconds of one decode step: stages, hops, and the token's way back."""
    seconds, last = 0.0, MASTER_INDEX
    for node, device, start, stop in way:
        if node != last:
            seconds += costs.hop[last][node] if start else costs.first[node]
        seconds += costs.nodes[node].devices[device].seconds(start, stop)
        last = node
    return seconds + costs.first[last]


def _first_seconds(
    info: ModelInfo, costs: Costs, cluster: ClusterProfile, ask: PlanRequest, way: Sequence[Step]
) -> float | None:
    """The first chunk passes every device and link; each further one comes as soon as the slowest of them allows."""
    if any(not costs.nodes[node].devices[device].chunk_time for node, device, _, _ in way):
        return None
    chunk = min(ask.prompt, ask.chunk)
    parts, last = [], MASTER_INDEX
    for node, device, start, stop in way:
        if node != last:
            parts.append(_transfer(info, cluster, costs, (last, node), chunk if start else 0, ask.chain))
        parts.append(costs.nodes[node].devices[device].chunk_seconds(start, stop))
        last = node
    whole = sum(parts) + costs.first[last]
    more = ask.prompt / chunk - 1
    # Without a worker nothing overlaps: one thread computes chunk after chunk.
    return whole + more * (max(parts) if any(step[0] != MASTER_INDEX for step in way) else whole)


def _transfer(
    info: ModelInfo, cluster: ClusterProfile, costs: Costs, hop: tuple[int, int], positions: int, chain: bool
) -> float:
    nbytes = info.hidden_bytes_per_token * positions or 4 * positions
    one, other = (costs.nodes[index].name for index in hop)
    master = cluster.master.name
    if chain or master in (one, other):
        return cluster.link(one, other).one_way(nbytes)
    return cluster.link(one, master).one_way(nbytes) + cluster.link(master, other).one_way(nbytes)


def placement_of(info: ModelInfo, costs: Costs, way: Sequence[Step]) -> Placement:
    """Steps of one node in a row are one span: the node splits it over its devices itself."""
    spans: list[Span] = []
    for node, _, start, stop in way:
        name, layers = costs.nodes[node].name, tuple(layer.name for layer in info.layers[start:stop])
        if spans and spans[-1].node == name:
            spans[-1] = Span((name,), (*spans[-1].layers, *layers))
        else:
            spans.append(Span((name,), layers))
    return Placement(tuple(spans))


def planned_stages(info: ModelInfo, costs: Costs, way: Sequence[Step]) -> tuple[PlannedStage, ...]:
    stages = []
    for node, place, start, stop in way:
        device, layers = costs.nodes[node].devices[place], info.layers[start:stop]
        weights = sum(layer.nbytes for layer in layers)
        kv = costs.memory[stop] - costs.memory[start] - weights
        names = tuple(layer.name for layer in layers)
        stages.append(
            PlannedStage(
                costs.nodes[node].name, device.device, names, weights, kv, int(device.room), device.seconds(start, stop)
            )
        )
    return tuple(stages)
