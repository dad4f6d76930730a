"""The planner beside an exact solver: random clusters whose chains are planned by Cake and by HiGHS (pip install scipy).

    python benchmarks/planner_exact.py --workers 11 --layers 24 --cases 8 --limit 60

The solver gets the same costs as a mixed integer program: a token's way is a path over (worker, layer) whose arcs are runs of
layers and hops, every worker has at most one run. It shares no search with the planner. `gap` is what it could not exclude in
its time: the best way takes at least `bound`.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from cake_core.errors import CapacityError
from cake_core.model import Layer, ModelInfo
from cake_core.planners import PlanRequest, plan
from cake_core.planners.costs import Costs, model_costs
from cake_core.profiles import ClusterProfile, DeviceProfile, LinkProfile, NodeProfile

CONTEXT = 2048
SOURCE, SINK = "source", "sink"


def random_case(rng: random.Random, blocks: int, workers: int, room: float) -> tuple[ModelInfo, ClusterProfile]:
    """A model of even layers, and machines with room for a fiftieth of it to `room`: about 2 / room of them are needed."""
    layers = [Layer("model.embed_tokens", 300_000_000, ("e",), 300_000_000, 0, 0, 0)]
    layers += [
        Layer(f"model.layers.{i}", 200_000_000, (f"l{i}",), 200_000_000, 1000, 200_000_000, 200_000_000) for i in range(blocks)
    ]
    layers += [Layer("model.norm", 8192, ("n",), 8192, 0, 8192, 0)]
    layers += [Layer("lm_head", 500_000_000, ("h",), 500_000_000, 0, 500_000_000, 500_000_000)]
    info = ModelInfo("any", "text", "random", "Random", tuple(layers), "bf16", 16384, 1000, 4096)
    total = sum(layer.nbytes for layer in layers)

    def node(name: str) -> NodeProfile:
        free = int(total * rng.uniform(0.02, room))
        return NodeProfile(name, (DeviceProfile("dev", free, rng.uniform(1e10, 5e11), overhead=rng.choice([0.0, 1e-4, 2e-3])),))

    names = ["master", *(f"w{i}" for i in range(workers))]
    links = {
        (a, b): LinkProfile(rng.choice([1e-4, 5e-4, 2e-3, 1e-2]) * rng.uniform(0.5, 2), rng.choice([2e7, 1.2e8, 1e9]))
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
    return info, ClusterProfile(node("master"), tuple(map(node, names[1:])), links)


@dataclass(slots=True)
class Program:
    """Arcs of a path from SOURCE to SINK, each with its seconds; `run` names the worker whose one run an arc is."""

    cost: list[float] = field(default_factory=list)
    ends: list[tuple[object, object]] = field(default_factory=list)
    run: list[int] = field(default_factory=list)

    def arc(self, start: object, stop: object, seconds: float, run: int = -1) -> None:
        self.cost.append(seconds)
        self.ends.append((start, stop))
        self.run.append(run)

    def solve(self, seconds: float) -> tuple[float, float]:
        """The best way found, and what no way is below."""
        places = {place: i for i, place in enumerate(dict.fromkeys(p for ends in self.ends for p in ends))}
        flow = [(places[p], arc, sign) for arc, ends in enumerate(self.ends) for p, sign in zip(ends, (1, -1), strict=True)]
        balance = np.zeros(len(places))
        balance[places[SOURCE]], balance[places[SINK]] = 1, -1
        once = [(run, arc, 1) for arc, run in enumerate(self.run) if run >= 0]
        shape = len(self.cost)
        found = milp(
            np.array(self.cost),
            integrality=np.ones(shape),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(_sparse(flow, (len(places), shape)), balance, balance),
                LinearConstraint(_sparse(once, (max(self.run) + 1, shape)), -np.inf, 1),
            ],
            options={"time_limit": seconds, "mip_rel_gap": 1e-6},
        )
        best = float("inf") if found.x is None else float(found.fun)
        return best, float(found.mip_dual_bound if found.mip_dual_bound is not None else 0.0)


def _sparse(entries: list[tuple[int, int, int]], shape: tuple[int, int]) -> csr_array:
    rows, columns, values = zip(*entries, strict=True)
    return csr_array((values, (rows, columns)), shape=shape)


def program(costs: Costs, tail: bool) -> Program | None:
    """The ways of a chain, with the layers without KV cache at the end on the master or not; None where those do not fit."""
    made, size, workers = Program(), costs.kv_free_tail if tail else costs.layers, range(1, len(costs.nodes))
    held = costs.memory[-1] - costs.memory[size]
    own = costs.nodes[0].devices[0]
    if held > own.room:
        return None
    kept = own.time[-1] - own.time[size] + own.overhead if tail else 0.0
    for stop in range(1, size + 1):
        if costs.memory[stop] + held <= own.room:
            made.arc(SOURCE, ("out", 0, stop), own.seconds(0, stop))
    made.arc(("out", 0, size), SINK, kept)
    for node in workers:
        made.arc(SOURCE, ("in", node, 0), costs.first[node])
        made.arc(("out", node, size), SINK, costs.hop[node][0] + kept if tail else costs.first[node])
        for start, stop in _runs(costs, node, size):
            made.arc(("in", node, start), ("out", node, stop), costs.nodes[node].devices[0].seconds(start, stop), node)
    for last, node, layer in product((0, *workers), workers, range(1, size)):
        if last != node:
            made.arc(("out", last, layer), ("in", node, layer), costs.hop[last][node])
    return made


def _runs(costs: Costs, node: int, size: int) -> Iterator[tuple[int, int]]:
    room = costs.nodes[node].devices[0].room
    for start in range(size):
        for stop in range(start + 1, size + 1):
            if costs.memory[stop] - costs.memory[start] > room:
                break
            yield start, stop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=11)
    parser.add_argument("--layers", type=int, default=24, help="with embeddings, norm and head")
    parser.add_argument("--room", type=float, default=0.3, help="of the roomiest machine, as a share of the model")
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--limit", type=float, default=60, help="seconds of the solver for a program; two a case")
    given = parser.parse_args()
    for seed in range(given.cases):
        info, cluster = random_case(random.Random(seed), given.layers - 3, given.workers, given.room)
        ask = PlanRequest(CONTEXT, chain=True)
        began = time.process_time()
        try:
            ours = plan(info, cluster, ask).prediction.seconds_per_token
        except CapacityError:
            continue
        took, began = time.process_time() - began, time.perf_counter()
        programs = [made for tail in (False, True) if (made := program(model_costs(info, cluster, ask), tail)) is not None]
        solved = [made.solve(given.limit) for made in programs]
        best, bound = min(found for found, _ in solved), min(low for _, low in solved)
        print(
            f"| {seed} | {ours * 1e3:.3f} ms in {took:.2f} s | {best * 1e3:.3f} ms (at least {bound * 1e3:.3f}) in "
            f"{time.perf_counter() - began:.0f} s | {(ours / best - 1) * 100:+.2f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
