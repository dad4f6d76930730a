"""The search for the cheapest way to lay the layers over the nodes.

A way begins on the master, visits workers, each once and each for one contiguous run of layers, and ends where the last layer
lives; the master may hold a first run and the tail (norm and head), and wherever the topology pins layers, the rest of them.

A *front* is what dynamic programming keeps: for every number of layers covered so far the least seconds and the way to it.
Going through a device adds ``time[stop] - time[start]``, so the best start for every stop is the minimum of
``cost[start] - time[start]`` over a window that memory bounds from below: both ends of the window only move forwards, and all
stops together cost one pass. `every_order` keeps a front for each set of visited workers and its last one, which is exact;
`one_order` visits them in a given order, each or not, which is exact for that order.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cake_core.planners.costs import Costs, NodeCosts
from cake_core.planners.fronts import NOTHING, Found, Front, Fronts, Visited, Way, appended, least, run

MASTER_INDEX = 0


@dataclass(frozen=True, slots=True)
class Pin:
    """Layers `start` to `stop` belong to a node. Optional ones only may."""

    start: int
    stop: int
    node: int
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Rules:
    """What bounds the ways: pins, the longest time a device or link may be busy for a token, and the price in seconds a byte
    of the master's memory, None where the master takes one run only."""

    pins: tuple[Pin, ...] = ()
    period: float = math.inf
    master_price: float | None = None


class Search:
    """Steps between fronts under some rules."""

    def __init__(self, costs: Costs, rules: Rules) -> None:
        self.costs = costs
        self.rules = rules
        self.size = costs.layers
        self._nodes = (_master(costs, rules), *costs.nodes[1:])
        held = [pin for pin in rules.pins if pin.node == MASTER_INDEX]
        self._held_seconds = sum(costs.nodes[0].devices[0].seconds(pin.start, pin.stop) for pin in held)
        fences = fences_of(self.size, rules.pins)
        self._lows = [
            [self._low(index, place, fences) for place in range(len(n.devices))] for index, n in enumerate(self._nodes)
        ]
        self._full = sorted(self._when_full(node) for node in range(1, len(self._nodes)))
        self._pinned = {pin: self._pinned_way(pin) for pin in rules.pins}

    def start(self) -> Fronts:
        """Nothing covered, or a first run on the master."""
        empty = Front([0.0, *[math.inf] * self.size], [None] * (self.size + 1))
        fronts = {MASTER_INDEX: least(empty, self._through(MASTER_INDEX, empty))}
        return self.settle(fronts)

    def alone(self, node: int) -> tuple[float, Way | None]:
        """Every layer on one node."""
        cost = [self.costs.first[node], *[math.inf] * self.size]
        front = self._through(node, Front(cost, [None] * (self.size + 1)))
        return front.cost[-1] + self.costs.first[node], front.way[-1]

    def visit(self, fronts: Fronts, node: int) -> Front:
        """A run of layers on a worker after any of the fronts."""
        return self._through(node, self._enter(fronts, node))

    def settle(self, fronts: Fronts) -> Fronts:
        """Adds what costs no worker: pinned layers, and the master where it may take any run."""
        again = self.rules.master_price is not None
        for _ in range(len(self.rules.pins) + again):
            for pin in self.rules.pins:
                self._pin(fronts, pin)
            if again:
                taken = self._through(MASTER_INDEX, self._enter(fronts, MASTER_INDEX))
                fronts[MASTER_INDEX] = least(fronts.get(MASTER_INDEX, taken), taken)
        return fronts

    def finish(self, fronts: Fronts) -> tuple[float, Way | None]:
        """The cheapest whole way, back on the master."""
        ends = ((front.cost[-1] + self.costs.first[node], node) for node, front in fronts.items())
        cost, node = min(ends, default=(math.inf, MASTER_INDEX))
        return cost, fronts[node].way[-1] if cost < math.inf else None

    def promise(self, fronts: Fronts, visited: Visited) -> float:
        """About what a whole way takes that goes on from here: the rest goes to workers not visited yet, those first that are
        cheapest for what they hold when they are full."""
        left = [full for full in self._full if full[2] not in visited]
        best = math.inf
        rest, done, place = 0.0, 0.0, 0
        for index in range(self.size, -1, -1):
            needed = 1.0 - self.costs.memory[index] / self.costs.memory[-1]
            while place < len(left) and done + left[place][1] < needed:
                rest, done, place = rest + left[place][0] * left[place][1], done + left[place][1], place + 1
            if place == len(left) and done < needed:
                break
            pace = left[place][0] if place < len(left) else 0.0
            best = min(best, min(front.cost[index] for front in fronts.values()) + rest + pace * (needed - done))
        return best

    def _when_full(self, node: int) -> tuple[float, float, int]:
        """Seconds a share of the model, the largest share it can hold, and the worker."""
        shares = [min(1.0, max(device.room, 1.0) / self.costs.memory[-1]) for device in self._nodes[node].devices]
        hops = [self.costs.hop[node][other] + self.costs.hop[other][node] for other in range(len(self._nodes)) if other != node]
        seconds = min(hops) / (2 if self.costs.chain else 1)
        for share, device in zip(shares, self._nodes[node].devices, strict=True):
            seconds += device.overhead + share * device.time[-1]
        return seconds / sum(shares), sum(shares), node

    def _enter(self, fronts: Fronts, node: int) -> Front:
        cost: list[float] = [math.inf] * (self.size + 1)
        way: list[Way | None] = [None] * (self.size + 1)
        for last, front in fronts.items():
            if self.costs.busy[last][node] > self.rules.period:
                continue
            hop = self.costs.hop[last][node]
            for index, before in enumerate(front.cost):
                if before + hop < cost[index]:
                    cost[index], way[index] = before + hop, front.way[index]
        if fronts.get(MASTER_INDEX) and fronts[MASTER_INDEX].cost[0] == 0.0:
            cost[0], way[0] = self.costs.first[node], None
        return Front(cost, way)

    def _through(self, node: int, front: Front) -> Front:
        """Layers on a node: through its devices in their order, each or not, at least one."""
        best: Front | None = None
        for place, device in enumerate(self._nodes[node].devices):
            taken = run(device, self._lows[node][place], front, (node, place))
            best = taken if best is None else least(best, taken)
            front = least(front, taken)
        assert best is not None  # noqa: S101 - a profile has at least one device
        return best

    def _pin(self, fronts: Fronts, pin: Pin) -> None:
        seconds, way = self._pinned[pin]
        before = self._enter(fronts, pin.node)
        cost = before.cost[pin.start] + seconds
        if cost == math.inf:
            return
        front = fronts.setdefault(pin.node, Front([math.inf] * (self.size + 1), [None] * (self.size + 1)))
        if cost < front.cost[pin.stop]:
            front.cost[pin.stop], front.way[pin.stop] = cost, appended(before.way[pin.start], way)

    def _pinned_way(self, pin: Pin) -> tuple[float, Way | None]:
        """Pinned layers over the devices of their node. Where they do not fit they stay together on the first: the user's word
        counts, and the plan says what is short."""
        devices = self.costs.nodes[pin.node].devices
        whole = devices[0].seconds(pin.start, pin.stop), (None, pin.node, 0, pin.start, pin.stop)
        if pin.node == MASTER_INDEX or len(devices) == 1:
            return whole if whole[0] <= self.rules.period else (math.inf, None)
        cost = [math.inf] * (self.size + 1)
        cost[pin.start] = 0.0
        front = Front(cost, [None] * (self.size + 1))
        for place, device in enumerate(devices):
            low = self._low(pin.node, place, [0] * (self.size + 1))
            front = least(front, run(device, low, front, (pin.node, place)))
        found = front.cost[pin.stop], front.way[pin.stop]
        return whole if found[1] is None and self.rules.period == math.inf else found

    def _low(self, node: int, place: int, fences: Sequence[int]) -> list[int]:
        """For every stop the first layer from which a run on that device fits its memory, the period and the fences."""
        device, memory = self._nodes[node].devices[place], self.costs.memory
        busy = self._held_seconds if (node, place) == (MASTER_INDEX, 0) else 0.0
        left = self.rules.period - device.overhead - busy
        found = []
        for stop in range(self.size + 1):
            by_memory = bisect_left(memory, memory[stop] - device.room)
            by_time = bisect_left(device.time, device.time[stop] - left) if left >= 0 else stop
            found.append(max(by_memory, by_time, fences[stop]))
        return found


def fences_of(size: int, pins: Iterable[Pin]) -> list[int]:
    """For every stop the first layer of the free run that ends there; `stop` itself after a pinned layer."""
    owned = {layer for pin in pins if not pin.optional for layer in range(pin.start, pin.stop)}
    fences = [0]
    for stop in range(1, size + 1):
        fences.append(stop if stop - 1 in owned else fences[-1])
    return fences


def _master(costs: Costs, rules: Rules) -> NodeCosts:
    """The master as the search may fill it: less the memory of what is pinned on it, the price of memory in its times."""
    held = [pin for pin in rules.pins if pin.node == MASTER_INDEX]
    nbytes = sum(costs.memory[pin.stop] - costs.memory[pin.start] for pin in held)
    first, *more = costs.nodes[MASTER_INDEX].devices
    price = rules.master_price or 0.0
    time = tuple(t + price * m for t, m in zip(first.time, costs.memory, strict=True))
    return NodeCosts(costs.nodes[MASTER_INDEX].name, (replace(first, room=first.room - nbytes, time=time), *more))


def every_order(search: Search, workers: Sequence[int], width: int = 0, best: Found = NOTHING) -> Found:
    """The cheapest way over any of the workers in any order, if cheaper than `best`.

    Exact where `width` is 0: a front for each set of visited workers and its last one. Else only so many sets of each size are
    followed, those that promise most.
    """
    level = {frozenset[int](): search.start()}
    while level:
        for fronts in level.values():
            best = min(best, search.finish(fronts), key=lambda found: found[0])
        if width and len(level) > width:
            promising = sorted(level.items(), key=lambda item: search.promise(item[1], item[0]))
            level = dict(promising[:width])
        level = _one_more(search, level, workers, best[0])
    return best


def _one_more(search: Search, level: Mapping[Visited, Fronts], workers: Sequence[int], below: float) -> dict[Visited, Fronts]:
    """The sets with one more worker, as far as they may still be cheaper than `below`."""
    found: dict[Visited, Fronts] = {}
    for visited, fronts in level.items():
        for node in workers:
            if node in visited:
                continue
            front = search.visit(fronts, node)
            if min(front.cost) < below:
                found.setdefault(visited | {node}, {})[node] = front
    return {visited: search.settle(fronts) for visited, fronts in found.items()}


def one_order(search: Search, order: Sequence[int]) -> Found:
    """The cheapest way that visits workers in this order, each or not."""
    fronts = search.start()
    for node in order:
        fronts[node] = search.visit(fronts, node)
        search.settle(fronts)
    return search.finish(fronts)
