"""Layers shared out by memory alone: for `--spread`, and where nothing was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cake_core.errors import CapacityError
from cake_core.model import Layer, ModelInfo
from cake_core.topology import MASTER, Topology

KV_SHARE = 0.5
"""Share of the memory left after its weights that a stage takes for its KV cache where nobody gave `kv_tokens`."""
ROOM = 0.9
"""Share of the free memory that weights and KV cache may take."""


def spread(info: ModelInfo, topology: Topology, memory: Mapping[str, int], kv_tokens: int) -> Topology:
    """The topology with every layer that no node lists shared out among `memory`'s nodes (the master may be one), in runs that
    are as long as their free bytes allow, each node at least one layer while there are enough. Pure.

    Raises CapacityError, with the numbers, when weights and `kv_tokens` positions of KV cache do not fit.
    """
    listed = {layer for node in topology.nodes for layer in node.layers}
    free = [layer for layer in info.layers if layer.name not in listed]
    sizes = [layer.nbytes + layer.kv_bytes_per_token * kv_tokens for layer in free]
    room = {name: int(nbytes * ROOM) for name, nbytes in memory.items()}
    if sum(sizes) > sum(room.values()):
        raise CapacityError(
            f"{info.name} needs {sum(sizes) / 1e9:.2f} GB with its KV cache, {sum(room.values()) / 1e9:.2f} GB are free on "
            f"{', '.join(room)}; add workers, or take a smaller --context or --quantize int4"
        )
    share = components if info.model_type == "image" else _runs
    owners = share(free, sizes, room)
    given = {name: tuple(layer.name for layer, owner in zip(free, owners, strict=True) if owner == name) for name in room}
    nodes = [replace(node, layers=node.layers or given.get(node.name, ())) for node in topology.nodes]
    return Topology(tuple(node for node in nodes if node.layers), topology.source)


def _runs(layers: Sequence[Layer], sizes: Sequence[int], room: Mapping[str, int]) -> list[str]:
    """Contiguous runs in the order of the nodes, the master's first, cut where its share of the bytes is reached."""
    names = [name for name in room if name == MASTER] + [name for name in room if name != MASTER]
    names = names[: len(layers)]
    total, capacity = sum(sizes), sum(room[name] for name in names)
    owners: list[str] = []
    node, used, target = 0, 0, total * room[names[0]] / max(1, capacity)
    for index, size in enumerate(sizes):
        left = len(sizes) - index
        more = len(names) - node - 1
        full = used + size / 2 > target and owners and owners[-1] == names[node]
        if more and (full or left <= more):
            node += 1
            target += total * room[names[node]] / max(1, capacity)
        owners.append(names[node])
        used += size
    return owners


def components(layers: Sequence[Layer], sizes: Sequence[int], room: Mapping[str, int]) -> list[str]:
    """Whole components, the largest first, each to the node with the most room left."""
    left, owners = dict(room), dict.fromkeys(range(len(layers)), "")
    for index in sorted(owners, key=lambda index: -sizes[index]):
        owners[index] = max(left, key=lambda name: left[name])
        left[owners[index]] -= sizes[index]
    return [owners[index] for index in range(len(layers))]
