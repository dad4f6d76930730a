"""The shortest period: how often a token can leave a pipeline whose slowest stage, or link, bounds it.

Whether a period is possible needs no costs: every node takes as many layers as it can serve within it, and getting further
never hurts whoever comes next. So for each set of visited workers only the furthest layer counts, and the period is found by
bisection.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cake_core.planners.costs import Costs
from cake_core.planners.fronts import Step
from cake_core.planners.search import MASTER_INDEX, Pin, Rules, fences_of

PRECISION, ROUGHLY = 1e-7, 1e-4
"""Of the period, as a share of it, where everything is tried and where not."""
WIDTH = 48
"""Sets of workers that are followed at each size where there are too many for all: those with the most left to hope for."""


def period_of(costs: Costs, found: Sequence[Step]) -> float:
    """Seconds a token of the slowest device or link of a way."""
    busy: dict[tuple[int, int], float] = {}
    for node, device, start, stop in found:
        seconds = costs.nodes[node].devices[device].seconds(start, stop)
        busy[node, device] = busy.get((node, device), 0.0) + seconds
    visited = [step[0] for step in found]
    links = [costs.busy[one][other] for one, other in itertools.pairwise(visited)]
    return max(*busy.values(), *links, 0.0)


@dataclass(frozen=True, slots=True)
class _Reached:
    layer: int
    last: int
    order: tuple[int, ...]


Level = dict[tuple[frozenset[int], int, bool], _Reached]
"""By the workers visited, the last node, and whether anything is covered at all: before that no link carries a hidden state."""


def shortest_period(costs: Costs, rules: Rules, workers: Sequence[int], exact: bool) -> tuple[float, tuple[int, ...]] | None:
    """The shortest period, a hair above, and an order of workers that keeps it; None where the layers fit nowhere."""
    high = sum(device.seconds(0, costs.layers) for node in costs.nodes for device in node.devices)
    high += max(map(max, costs.busy))
    order = _Reach(costs, replace(rules, period=high)).covering(workers, exact)
    if order is None:
        return None
    low = 0.0
    while high - low > (PRECISION if exact else ROUGHLY) * high:
        middle = (low + high) / 2
        found = _Reach(costs, replace(rules, period=middle)).covering(workers, exact)
        if found is None:
            low = middle
        else:
            high, order = middle, found
    return high, order


class _Reach:
    def __init__(self, costs: Costs, rules: Rules) -> None:
        self.costs, self.rules = costs, rules
        self.size = costs.layers
        self._pins = {pin.start: pin for pin in rules.pins if not pin.optional}
        self._tail = next((pin for pin in rules.pins if pin.optional), None)
        fences = fences_of(self.size, rules.pins)
        self._ends = _ends(fences)
        self._shares = [self._share(node) for node in range(len(costs.nodes))]
        held = [pin for pin in rules.pins if pin.node == MASTER_INDEX]
        self._held_seconds = sum(costs.nodes[0].devices[0].seconds(pin.start, pin.stop) for pin in held)
        self._held_bytes = sum(costs.memory[pin.stop] - costs.memory[pin.start] for pin in held)

    def covering(self, workers: Sequence[int], exact: bool) -> tuple[int, ...] | None:
        """An order of workers that serves every layer within the period, None where there is none."""
        empty = self._settle(_Reached(0, MASTER_INDEX, ()))
        filled = self._settle(_Reached(self._advance(MASTER_INDEX, 0), MASTER_INDEX, ()))
        level: Level = {(frozenset(), state.last, state.layer > 0): state for state in (empty, filled)}
        while level:
            for state in level.values():
                if self._done(state):
                    return state.order
            level = self._next(level, workers)
            if not exact and len(level) > WIDTH:
                kept = sorted(level.items(), key=lambda item: -self._hope(item[1], workers))[:WIDTH]
                level = dict(kept)
        return None

    def _hope(self, state: _Reached, workers: Sequence[int]) -> float:
        """Share of the model that is covered, and that the workers which are left can serve if nothing is lost to rounding."""
        covered = self.costs.memory[state.layer] / self.costs.memory[-1]
        return covered + sum(self._shares[node] for node in workers if node not in state.order)

    def _share(self, node: int) -> float:
        """Of the model, that a node can serve within the period."""
        most = 0.0
        for device in self.costs.nodes[node].devices:
            by_time = max(0.0, self.rules.period - device.overhead) / max(device.time[-1], 1e-12)
            most += min(by_time, device.room / self.costs.memory[-1])
        return most

    def _next(self, level: Level, workers: Sequence[int]) -> Level:
        found: Level = {}
        for (chosen, last, _), state in level.items():
            for node in workers:
                if node in chosen or (state.layer and self.costs.busy[last][node] > self.rules.period):
                    continue
                layer = self._advance(node, state.layer)
                if layer == state.layer:
                    continue
                new = self._settle(_Reached(layer, node, (*state.order, node)))
                key = (chosen | {node}, new.last, True)
                if key not in found or found[key].layer < new.layer:
                    found[key] = new
        return found

    def _advance(self, node: int, layer: int) -> int:
        """How far a node gets from a layer."""
        memory, end = self.costs.memory, self._ends[layer]
        for place, device in enumerate(self.costs.nodes[node].devices):
            own = (node, place) == (MASTER_INDEX, 0)
            left = self.rules.period - device.overhead - (self._held_seconds if own else 0.0)
            room = device.room - (self._held_bytes if own else 0)
            if left < 0 or room < 0:
                continue
            by_time = bisect_right(device.time, device.time[layer] + left) - 1
            layer = max(layer, min(end, by_time, bisect_right(memory, memory[layer] + room) - 1))
        return layer

    def _settle(self, state: _Reached) -> _Reached:
        """Goes on over pinned layers, and over what the master may take between them."""
        while True:
            pin = self._pins.get(state.layer)
            if pin is not None and self._fits(pin) and self._passes(state, pin.node):
                state = _Reached(pin.stop, pin.node, state.order)
            elif self.rules.master_price is not None and (layer := self._advance(MASTER_INDEX, state.layer)) > state.layer:
                state = _Reached(layer, MASTER_INDEX, state.order)
            else:
                return state

    def _fits(self, pin: Pin) -> bool:
        devices = self.costs.nodes[pin.node].devices
        return min(device.seconds(pin.start, pin.stop) for device in devices) <= self.rules.period

    def _passes(self, state: _Reached, node: int) -> bool:
        return not state.layer or self.costs.busy[state.last][node] <= self.rules.period

    def _done(self, state: _Reached) -> bool:
        if state.layer == self.size:
            return True
        tail = self._tail
        return tail is not None and state.layer >= tail.start and self._fits(tail) and self._passes(state, MASTER_INDEX)


def _ends(fences: Sequence[int]) -> list[int]:
    """For every layer where the free run that begins with it has to end."""
    ends = [len(fences) - 1] * len(fences)
    for layer in range(len(fences) - 2, -1, -1):
        ends[layer] = layer if fences[layer + 1] > layer else ends[layer + 1]
    return ends
