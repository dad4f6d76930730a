"""Which node should serve which layers: decided from what machines and links were measured to do, in pure functions.

`plan` chooses nodes, their order and the cuts for the least time a token or the most tokens a second, within memory; `predict`
says what a given placement will do. `costs` holds the model both stand on, `search` and `throughput` the algorithms.
"""

from __future__ import annotations

from collections.abc import Iterator

from cake_core.errors import TopologyError
from cake_core.model import ModelInfo
from cake_core.placement import Placement, place
from cake_core.planners.costs import Costs, model_costs
from cake_core.planners.fronts import steps
from cake_core.planners.images import plan_images
from cake_core.planners.report import placement_of, planned_stages, predict_steps
from cake_core.planners.request import Alone, Plan, PlannedStage, PlanRequest, Prediction
from cake_core.planners.search import Pin, Rules, Search
from cake_core.planners.ways import best_way
from cake_core.planners.words import advice, reasons, topology_of
from cake_core.profiles import ClusterProfile
from cake_core.topology import MASTER, Topology


def plan(info: ModelInfo, cluster: ClusterProfile, ask: PlanRequest) -> Plan:
    """The best placement for what is asked.

    Raises CapacityError where the layers do not fit the cluster, TopologyError where the fixed part does not fit the model or
    names a node that has no profile.
    """
    if info.model_type == "image":
        return plan_images(info, cluster, ask)
    costs = model_costs(info, cluster, ask)
    way = best_way(costs, ask, list(_pins(info, ask.topology, cluster)))
    prediction = predict_steps(info, costs, cluster, ask, way)
    placement = placement_of(info, costs, way)
    stages = planned_stages(info, costs, way)
    alone = _best_alone(info, costs, cluster, ask)
    return Plan(
        placement=placement,
        topology=topology_of(placement, cluster, ask.topology),
        stages=stages,
        prediction=prediction,
        left_out=reasons(costs, way),
        alone=alone,
        kv_tokens=(ask.context or info.context_length) * ask.streams,
        advice=tuple(advice(stages, prediction, alone)),
    )


def predict(info: ModelInfo, placement: Placement, cluster: ClusterProfile, ask: PlanRequest) -> Prediction:
    """What a placement of a text model will do, whoever made it; each node fills its fastest device first."""
    costs = model_costs(info, cluster, ask)
    index = {node.name: place for place, node in enumerate(costs.nodes)}
    pins, start = [], 0
    for span in placement.spans:
        if span.node not in index:
            raise TopologyError(f"no profile of node {span.node!r}; there are {', '.join(index)}")
        pins.append(Pin(start, start + len(span.layers), index[span.node]))
        start += len(span.layers)
    search = Search(costs, Rules(tuple(pins)))
    return predict_steps(info, costs, cluster, ask, steps(search.finish(search.start())[1]))


def _pins(info: ModelInfo, topology: Topology, cluster: ClusterProfile) -> Iterator[Pin]:
    """The runs of layers that the topology gives to nodes."""
    index = {node.name: place for place, node in enumerate((cluster.master, *cluster.nodes))}
    start = 0
    for span in place(info, topology).spans:
        stop = start + len(span.layers)
        if span.node not in index:
            where = topology.source or "the topology"
            raise TopologyError(f"{where} gives layers to {span.node!r}, of which nothing is known; measure it, or take it out")
        if span.node != MASTER:
            yield Pin(start, stop, index[span.node])
        start = stop


def _best_alone(info: ModelInfo, costs: Costs, cluster: ClusterProfile, ask: PlanRequest) -> Alone | None:
    search = Search(costs, Rules())
    ways = [(*search.alone(index), node.name) for index, node in enumerate(costs.nodes)]
    seconds, way, name = min(ways, key=lambda found: found[0])
    if way is None or seconds == float("inf"):
        return None
    return Alone(name, predict_steps(info, costs, cluster, ask, steps(way)))


__all__ = ["Alone", "Plan", "PlanRequest", "PlannedStage", "Prediction", "plan", "predict"]
