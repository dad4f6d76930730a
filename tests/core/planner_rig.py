"""Random clusters and models for the planner, and a search by trying everything that shares no code with it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from cake_core.model import Layer, ModelInfo
from cake_core.profiles import ClusterProfile, DeviceProfile, LinkProfile, NodeProfile

TOKEN = 4
SPARE = 0.92
KV = 1000


def random_model(rng: random.Random, blocks: int, even: bool = False) -> ModelInfo:
    def layer(name: str, nbytes: int, kv: int, read: bool = True) -> Layer:
        return Layer(name, nbytes, (name,), nbytes, kv, nbytes if read else 0, nbytes)

    sizes = [200_000_000 if even else rng.randrange(50, 400) * 1_000_000 for _ in range(blocks)]
    layers = [layer("model.embed_tokens", rng.randrange(1, 600) * 1_000_000, 0, read=False)]
    layers += [layer(f"model.layers.{index}", size, KV) for index, size in enumerate(sizes)]
    layers += [layer("model.norm", 8192, 0), layer("lm_head", rng.randrange(1, 900) * 1_000_000, 0)]
    return ModelInfo("any", "text", "random", "Random", tuple(layers), "bf16", 16384, 1000, 4096)


def random_node(rng: random.Random, name: str, total: float, devices: int = 1, small: float = 0.15) -> NodeProfile:
    found = []
    for index in range(devices):
        free = int(total * rng.uniform(small, 0.9))
        bandwidth, overhead = rng.uniform(1e10, 5e11), rng.choice([0.0, 1e-4, 2e-3])
        found.append(
            DeviceProfile(f"dev:{index}", free, bandwidth, "bf16", free, overhead, rng.choice([0.0, 1e-5]), {"bf16": 1e12})
        )
    return NodeProfile(name, tuple(found))


def random_link(rng: random.Random) -> LinkProfile:
    return LinkProfile(rng.choice([1e-4, 5e-4, 2e-3, 1e-2]) * rng.uniform(0.5, 2), rng.choice([2e7, 1.2e8, 1e9]))


def random_cluster(rng: random.Random, info: ModelInfo, workers: int, devices: int = 1, small: float = 0.15) -> ClusterProfile:
    total = sum(layer.nbytes for layer in info.layers)
    names = [f"w{index}" for index in range(workers)]
    nodes = tuple(random_node(rng, name, total, rng.randint(1, devices), small) for name in names)
    everybody = ["master", *names]
    links = {(a, b): random_link(rng) for i, a in enumerate(everybody) for b in everybody[i + 1 :]}
    return ClusterProfile(random_node(rng, "master", total, small=small), nodes, links)


class BruteForce:
    """Every way: the master's first run, any workers in any order with any cuts, the tail on the master or not."""

    def __init__(self, info: ModelInfo, cluster: ClusterProfile, context: int, chain: bool) -> None:
        self.info, self.cluster, self.chain, self.context = info, cluster, chain, context
        self.n = len(info.layers)
        self.tail = self.n - 2
        self.position = context // 2

    def ways(self) -> Iterator[tuple[float, float]]:
        """(seconds a token, period) of every way that fits."""
        for tail in (False, True):
            end = self.tail if tail else self.n
            for first in range(end + 1):
                held = self._bytes(0, first) + (self._bytes(self.tail, self.n) if tail else 0)
                if held > self.cluster.master.devices[0].memory_free * SPARE:
                    continue
                own = [self._stage("master", 0, first)] if first else []
                own += [self._stage("master", self.tail, self.n)] if tail else []
                for seconds, period in self._go("master", first, end, frozenset(), tail):
                    yield seconds + sum(own), max(period, sum(own))

    def _go(self, last: str, at: int, end: int, used: frozenset[str], tail: bool) -> Iterator[tuple[float, float]]:
        if at == end:
            if last == "master":
                yield 0.0, 0.0
            elif tail:
                yield self._hop(last, "master", at), self._busy(last, "master", at)
            else:
                yield self.cluster.link(last, "master").one_way(TOKEN), 0.0
            return
        for node in self.cluster.nodes:
            if node.name in used:
                continue
            hop, busy = self._hop(last, node.name, at), self._busy(last, node.name, at)
            for stop in range(at + 1, end + 1):
                if self._bytes(at, stop) > node.devices[0].memory_free * SPARE:
                    break
                stage = self._stage(node.name, at, stop)
                for seconds, period in self._go(node.name, stop, end, used | {node.name}, tail):
                    yield hop + stage + seconds, max(busy, stage, period)

    def _bytes(self, start: int, stop: int) -> int:
        return sum(layer.nbytes + layer.kv_bytes_per_token * self.context for layer in self.info.layers[start:stop])

    def _stage(self, node: str, start: int, stop: int) -> float:
        device = self.cluster.node(node).devices[0]
        seconds = device.overhead
        for layer in self.info.layers[start:stop]:
            if layer.weights_read_per_token:
                read = layer.weights_read_per_token + layer.kv_bytes_per_token * self.position
                seconds += read / device.bandwidth + device.layer_overhead
        return seconds

    def _links(self, one: str, other: str) -> list[LinkProfile]:
        if self.chain or "master" in (one, other):
            return [self.cluster.link(one, other)]
        return [self.cluster.link(one, "master"), self.cluster.link("master", other)]

    def _hop(self, one: str, other: str, at: int) -> float:
        nbytes = self.info.hidden_bytes_per_token if at else TOKEN
        return sum(link.one_way(nbytes) for link in self._links(one, other))

    def _busy(self, one: str, other: str, at: int) -> float:
        return max(self.info.hidden_bytes_per_token / link.rate for link in self._links(one, other)) if at else 0.0

    def fastest(self) -> float:
        return min((seconds for seconds, _ in self.ways()), default=math.inf)

    def busiest(self) -> tuple[float, float]:
        """The shortest period, and the least seconds among the ways that keep it."""
        found = list(self.ways())
        period = min((p for _, p in found), default=math.inf)
        return period, min((s for s, p in found if p <= period * (1 + 1e-7)), default=math.inf)
