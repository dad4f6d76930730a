"""Planning image models: whole components on nodes, the heaviest first, and replicas of it where throughput is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cake_core.errors import CapacityError, TopologyError
from cake_core.model import Layer, ModelInfo
from cake_core.placement import Placement, Span, place
from cake_core.planners.costs import SPARE
from cake_core.planners.request import Alone, Plan, PlannedStage, PlanRequest, Prediction
from cake_core.planners.words import topology_of
from cake_core.profiles import ClusterProfile, DeviceProfile
from cake_core.topology import MASTER

Place = tuple[str, str]
"""Node and device."""


@dataclass(slots=True)
class _Room:
    """A device and the bytes that are left on it."""

    node: str
    profile: DeviceProfile
    left: float

    def seconds(self, layer: Layer) -> float:
        """Of one call: its arithmetic where that is described, else reading its weights, which orders devices alike."""
        speed = max(self.profile.flops.values(), default=0.0)
        if layer.flops_per_token and speed:
            return layer.flops_per_token / speed + self.profile.overhead
        return layer.nbytes / self.profile.bandwidth + self.profile.overhead


def plan_images(info: ModelInfo, cluster: ClusterProfile, ask: PlanRequest) -> Plan:
    """Each component where a call of it is over soonest, the way there and back counted.

    Components keep no state and any may be anywhere, so this is an assignment: the heaviest chooses first, as it is called at
    every step. What is predicted is one pass over all components, which compares placements and is no image's time.
    """
    rooms = [
        _Room(node.name, device, device.memory_free * SPARE)
        for node in (cluster.master, *cluster.nodes)
        for device in node.devices
    ]
    chosen: dict[str, list[_Room]] = {layer.name: [] for layer in info.layers}
    for span in place(info, ask.topology).spans:
        for node in span.nodes:
            if node != MASTER:
                _take(info.layer(span.layers[0]), _of_node(rooms, node), chosen)
    for layer in sorted(info.layers, key=lambda layer: -layer.nbytes):
        if not chosen[layer.name]:
            fitting = [room for room in rooms if room.left >= layer.nbytes]
            if not fitting:
                raise CapacityError(
                    f"no node has {layer.nbytes / 1e9:.2f} GB left for {layer.name}; use a smaller --dtype, or add a machine"
                )
            _take(layer, min(fitting, key=lambda room: _seconds(layer, room, cluster)), chosen)
    if ask.objective == "throughput":
        _replicate(max(info.layers, key=lambda layer: layer.nbytes), rooms, chosen)
    return _as_plan(info, cluster, ask, chosen)


def _of_node(rooms: list[_Room], node: str) -> _Room:
    own = [room for room in rooms if room.node == node]
    if not own:
        raise TopologyError(f"the topology gives layers to {node!r}, of which nothing is known; measure it, or take it out")
    return max(own, key=lambda room: room.profile.bandwidth)


def _take(layer: Layer, room: _Room, chosen: dict[str, list[_Room]]) -> None:
    room.left -= layer.nbytes
    chosen[layer.name].append(room)


def _replicate(heaviest: Layer, rooms: list[_Room], chosen: dict[str, list[_Room]]) -> None:
    """The component called most, on every further node that has room: several images are painted at once. The master holds
    either its own or none, as it drives them all."""
    holders = {room.node for room in chosen[heaviest.name]}
    if not heaviest.stateless or MASTER in holders:
        return
    for room in rooms:
        if room.node not in holders | {MASTER} and room.left >= heaviest.nbytes:
            _take(heaviest, room, chosen)
            holders.add(room.node)


def _seconds(layer: Layer, room: _Room, cluster: ClusterProfile) -> float:
    way = 0.0 if room.node == MASTER else 2 * cluster.link(MASTER, room.node).one_way(0)
    return room.seconds(layer) + way


def _as_plan(info: ModelInfo, cluster: ClusterProfile, ask: PlanRequest, chosen: Mapping[str, list[_Room]]) -> Plan:
    spans = tuple(Span(tuple(room.node for room in chosen[layer.name]), (layer.name,)) for layer in info.layers)
    placement = Placement(spans)
    stages = tuple(
        PlannedStage(room.node, room.profile.device, (layer.name,), layer.nbytes, 0, int(room.profile.memory_free * SPARE),
                     _seconds(layer, room, cluster))
        for layer in info.layers for room in chosen[layer.name]
    )  # fmt: skip
    each = {layer.name: min(_seconds(layer, room, cluster) for room in chosen[layer.name]) for layer in info.layers}
    slowest = max(each[layer.name] / len(chosen[layer.name]) for layer in info.layers)
    used = set(placement.nodes)
    left = {
        node.name: "would not make an image sooner, or has no room for a component"
        for node in cluster.nodes
        if node.name not in used
    }
    prediction = Prediction(sum(each.values()), 1 / slowest, None)
    return Plan(placement, topology_of(placement, cluster, ask.topology), stages, prediction, left, _alone(info, cluster))


def _alone(info: ModelInfo, cluster: ClusterProfile) -> Alone | None:
    """The best device with room for everything."""
    needed = sum(layer.nbytes for layer in info.layers)
    found = []
    for node in (cluster.master, *cluster.nodes):
        for device in node.devices:
            room = _Room(node.name, device, device.memory_free * SPARE)
            if room.left >= needed:
                seconds = sum(_seconds(layer, room, cluster) for layer in info.layers)
                found.append(Alone(node.name, Prediction(seconds, 1 / seconds, None)))
    return min(found, key=lambda alone: alone.prediction.seconds_per_token, default=None)
