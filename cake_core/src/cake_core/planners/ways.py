"""Which way to take: exact where the workers are few, a bounded search over their orders beyond."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from cake_core.errors import CapacityError
from cake_core.planners.costs import Costs
from cake_core.planners.fronts import NOTHING, Found, Step, Way, steps
from cake_core.planners.orders import climb
from cake_core.planners.request import PlanRequest
from cake_core.planners.search import MASTER_INDEX, Pin, Rules, Search, every_order, one_order
from cake_core.planners.throughput import period_of, shortest_period

EXACT_WORKERS = 8
FOLLOWED = 30_000
"""Sets of workers of each size that are followed beyond, times workers and layers."""
PRICES = (0.0, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7)
"""Seconds a byte of the master's memory, tried until its runs between pinned layers fit together."""


def best_way(costs: Costs, ask: PlanRequest, pins: Sequence[Pin]) -> list[Step]:
    """The steps of the best way. Raises CapacityError where no way has room for every layer."""
    busy = {pin.node for pin in pins}
    workers = [index for index in range(1, len(costs.nodes)) if index not in busy]
    best = NOTHING
    for rules in _all_rules(costs, pins):
        found = _busiest(costs, rules, workers) if ask.objective == "throughput" else _fastest(costs, rules, workers)
        if found[1] is not None and _fits(costs, rules, found[1]) and _value(costs, ask, found) < _value(costs, ask, best):
            best = found
            if rules.master_price is not None:
                break
    if best[1] is None:
        raise CapacityError(_too_large(costs))
    return steps(best[1])


def _value(costs: Costs, ask: PlanRequest, found: Found) -> tuple[float, float]:
    if ask.objective == "latency" or found[1] is None:
        return found[0], found[0]
    return period_of(costs, steps(found[1])), found[0]


def _all_rules(costs: Costs, pins: Sequence[Pin]) -> Iterator[Rules]:
    """Without pinned layers: the tail kept for the master, or all of its memory for its first run. With them the master takes
    whatever is left between, at a price that rises until that fits."""
    if pins:
        yield from (Rules(tuple(pins), master_price=price) for price in PRICES)
        return
    tail = costs.memory[-1] - costs.memory[costs.kv_free_tail]
    if costs.kv_free_tail < costs.layers and tail <= costs.nodes[MASTER_INDEX].devices[0].room:
        yield Rules((Pin(costs.kv_free_tail, costs.layers, MASTER_INDEX, optional=True),))
    yield Rules()


def _fits(costs: Costs, rules: Rules, way: Way) -> bool:
    """Whether the master's runs fit its devices together: the search only bounds each by itself."""
    if rules.master_price is None:
        return True
    used: dict[int, int] = {}
    for node, device, start, stop in steps(way):
        if node == MASTER_INDEX:
            used[device] = used.get(device, 0) + costs.memory[stop] - costs.memory[start]
    devices = costs.nodes[MASTER_INDEX].devices
    return all(nbytes <= devices[device].room for device, nbytes in used.items())


def _too_large(costs: Costs) -> str:
    room = sum(device.room for node in costs.nodes for device in node.devices)
    return (
        f"the model needs {costs.memory[-1] / 1e9:.2f} GB for weights and KV cache, the cluster has {room / 1e9:.2f} GB in all "
        "that contiguous runs of layers can be cut to; use a smaller --context, --quantize, or add a machine"
    )


def _fastest(costs: Costs, rules: Rules, workers: Sequence[int], orders: Iterable[Sequence[int]] = ()) -> Found:
    search = Search(costs, rules)
    if len(workers) <= EXACT_WORKERS:
        return every_order(search, workers)
    tried = (one_order(search, order) for order in (*orders, *_tours(costs, workers)))
    followed = FOLLOWED if rules.period == math.inf else FOLLOWED // 4
    width = max(4, followed // (len(workers) * costs.layers))
    found = every_order(search, workers, width, min(tried, key=lambda found: found[0]))
    return climb(search, workers, found) if costs.chain else found


def _busiest(costs: Costs, rules: Rules, workers: Sequence[int]) -> Found:
    """The fastest of the ways with the shortest period."""
    shortest = shortest_period(costs, rules, workers, exact=len(workers) <= EXACT_WORKERS)
    if shortest is None:
        return NOTHING
    period, order = shortest
    rest = [node for node in workers if node not in order]
    return _fastest(costs, replace(rules, period=period), workers, [[*order, *rest]])


def _tours(costs: Costs, workers: Sequence[int]) -> Iterator[list[int]]:
    """Orders to begin with: the slowest first, as the fastest does best beside the head, and from each worker on always to
    the nearest next."""
    slowest = sorted(workers, key=lambda node: -costs.nodes[node].devices[0].time[-1])
    yield slowest
    if not costs.chain:
        yield from ([*(other for other in slowest if other != last), last] for last in slowest)
        return
    for first in workers:
        tour, left = [first], set(workers) - {first}
        while left:
            tour.append(min(left, key=lambda node: (costs.hop[tour[-1]][node], node)))
            left.remove(tour[-1])
        yield tour
