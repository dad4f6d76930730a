"""The cost model: what layers take on each device, and what the way between nodes takes.

A decode step of a stage takes ``sum over its layers (weights / rate + KV read / bandwidth + layer overhead) + overhead``, and
a hop ``one-way latency + bytes / rate``. In a *star* every worker answers the master, so the way from one worker to another is
two hops; in a *chain* it is one. With several rows a batch a layer takes the longer of reading and computing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from cake_core.model import Layer, ModelInfo
from cake_core.planners.request import PlanRequest
from cake_core.profiles import ClusterProfile, DeviceProfile, NodeProfile

SPARE = 0.92
"""Share of a device's free memory that weights and KV cache may take; the rest is for what is computed on the way."""
TOKEN_BYTES = 4
LONGEST_POSITION = 4096
WIDTHS: Mapping[str, float] = {"f32": 32.0, "bf16": 16.0, "f16": 16.0, "int8": 8.5, "int4": 4.75}
"""Bits a weight takes, with its share of the scales."""


@dataclass(frozen=True, slots=True)
class DeviceCosts:
    """One device and the model's layers. `time[i]`: seconds of the first i layers in a decode step; likewise `chunk_time` in a
    batch of prompt positions (empty: not known). `room`: bytes for weights and KV cache."""

    device: str
    time: tuple[float, ...]
    overhead: float
    room: float
    chunk_time: tuple[float, ...] = ()

    def seconds(self, start: int, stop: int) -> float:
        return self.overhead + self.time[stop] - self.time[start]

    def chunk_seconds(self, start: int, stop: int) -> float:
        return self.overhead + self.chunk_time[stop] - self.chunk_time[start]


@dataclass(frozen=True, slots=True)
class NodeCosts:
    """A node: its devices in the order in which layers go through them and the node fills them."""

    name: str
    devices: tuple[DeviceCosts, ...]


@dataclass(frozen=True, slots=True)
class Costs:
    """Everything the search needs. Nodes by index, 0 the master.

    Attributes:
        memory: bytes of weights and KV cache of the first i layers.
        kv_free_tail: where the last layers without KV cache begin (norm and head): what may return to the master.
        hop: seconds a hidden state takes from one node to another. first, last: a token from and to the master.
        busy: seconds that the link of a hop is occupied, which bounds the throughput.
    """

    nodes: tuple[NodeCosts, ...]
    memory: tuple[int, ...]
    kv_free_tail: int
    hop: tuple[tuple[float, ...], ...]
    first: tuple[float, ...]
    busy: tuple[tuple[float, ...], ...]
    rows: int = 1
    chain: bool = False

    @property
    def layers(self) -> int:
        return len(self.memory) - 1


def model_costs(info: ModelInfo, cluster: ClusterProfile, ask: PlanRequest) -> Costs:
    """The costs of a text model on a cluster."""
    context = ask.context or info.context_length
    position = min(context // 2, LONGEST_POSITION) if ask.position is None else ask.position
    profiles = (cluster.master, *cluster.nodes)
    rows = max(1, ask.streams // len(profiles)) if ask.objective == "throughput" else 1
    memory = [layer.nbytes + layer.kv_bytes_per_token * context * ask.streams for layer in info.layers]
    names = [profile.name for profile in profiles]
    nbytes = info.hidden_bytes_per_token * rows
    with_cache = [index for index, layer in enumerate(info.layers) if layer.kv_bytes_per_token]
    return Costs(
        nodes=tuple(_node_costs(info, profile, ask, position, rows) for profile in profiles),
        memory=tuple(accumulate(memory, initial=0)),
        kv_free_tail=with_cache[-1] + 1 if with_cache else len(info.layers),
        hop=tuple(tuple(_hop(cluster, a, b, nbytes, ask.chain) for b in names) for a in names),
        first=tuple(0.0 if index == 0 else _hop(cluster, names[0], b, TOKEN_BYTES, False) for index, b in enumerate(names)),
        busy=tuple(tuple(_busy(cluster, a, b, nbytes, ask.chain) for b in names) for a in names),
        rows=rows,
        chain=ask.chain,
    )


def _node_costs(info: ModelInfo, profile: NodeProfile, ask: PlanRequest, position: int, rows: int) -> NodeCosts:
    return NodeCosts(profile.name, tuple(_device_costs(info, device, ask, position, rows) for device in profile.devices))


def _device_costs(info: ModelInfo, device: DeviceProfile, ask: PlanRequest, position: int, rows: int) -> DeviceCosts:
    steps = [_layer_seconds(device, layer, info.dtype, position, rows) for layer in info.layers]
    chunk = min(ask.prompt, ask.chunk)
    chunks = [_chunk_seconds(device, layer, info.dtype, chunk) for layer in info.layers]
    known = bool(device.flops)
    return DeviceCosts(
        device.device,
        tuple(accumulate(steps, initial=0.0)),
        device.overhead,
        device.memory_free * SPARE,
        tuple(accumulate(chunks, initial=0.0)) if known else (),
    )


def _layer_seconds(device: DeviceProfile, layer: Layer, dtype: str, position: int, rows: int) -> float:
    if not layer.weights_read_per_token:
        return 0.0
    reading = layer.weights_read_per_token / by_width(device.rates, layer, dtype, device.bandwidth)
    if rows > 1 and device.flops:
        reading = max(reading, rows * layer.flops_per_token / by_width(device.flops, layer, dtype, math.inf))
    cached = layer.kv_bytes_per_token * position * rows / device.bandwidth
    return reading + cached + device.layer_overhead


def _chunk_seconds(device: DeviceProfile, layer: Layer, dtype: str, chunk: int) -> float:
    """The head draws once a prompt, so it is read once; the other layers compute every position."""
    if not layer.kv_bytes_per_token:
        return _layer_seconds(device, layer, dtype, 0, 1)
    computing = chunk * layer.flops_per_token / by_width(device.flops, layer, dtype, math.inf)
    return max(computing, _layer_seconds(device, layer, dtype, 0, 1))


def by_width(rates: Mapping[str, float], layer: Layer, dtype: str, otherwise: float) -> float:
    """The rate for the width of a layer's weights: that of `dtype` among equals, else the nearest known."""
    if not rates or not layer.flops_per_token:
        return otherwise
    bits = 16.0 * layer.nbytes / layer.flops_per_token

    def distance(name: str) -> tuple[float, bool]:
        return abs(math.log(WIDTHS[name] / bits)), name != dtype

    known = [name for name in rates if name in WIDTHS]
    return rates[min(known, key=distance)] if known else otherwise


def _hop(cluster: ClusterProfile, one: str, other: str, nbytes: int, chain: bool) -> float:
    if one == other:
        return 0.0
    master = cluster.master.name
    if chain or master in (one, other):
        return cluster.link(one, other).one_way(nbytes)
    return cluster.link(one, master).one_way(nbytes) + cluster.link(master, other).one_way(nbytes)


def _busy(cluster: ClusterProfile, one: str, other: str, nbytes: int, chain: bool) -> float:
    if one == other:
        return 0.0
    master = cluster.master.name
    if chain or master in (one, other):
        return nbytes / cluster.link(one, other).rate
    return nbytes / min(cluster.link(one, master).rate, cluster.link(master, other).rate)
