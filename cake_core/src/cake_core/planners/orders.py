"""Local search over the orders of a chain: which workers, one after another, where there are too many to try every set.

For a given order dynamic programming finds the cuts (`search`), one worker at a time, so that orders which begin alike share
what their beginnings took. From the best order known, one worker is put in, left out, moved, changed for another or for a
stretch turned round, whatever shortens the hops first; where nothing helps any more the order is shaken and it begins again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

from cake_core.planners.costs import Costs
from cake_core.planners.fronts import NOTHING, Found, Fronts, Way, steps
from cake_core.planners.search import MASTER_INDEX, Search

VISITS = 300_000
"""Orders tried and workers visited in them, times layers."""
TURNED = 6
"""Workers of the longest stretch that is turned round."""

Order = tuple[int, ...]


def climb(search: Search, workers: Sequence[int], best: Found) -> Found:
    """The best that is found from `best`; the same every time."""
    if best[1] is None:
        return best
    tried = _Tried(search)
    rng = random.Random(0)  # noqa: S311 - no secret
    current = best
    while tried.left > 0:
        current = _uphill(search.costs, workers, tried, current)
        best = min(best, current, key=lambda found: found[0])
        current = tried.take(_shaken(_order(best[1]), workers, rng), NOTHING)
    return best


def _uphill(costs: Costs, workers: Sequence[int], tried: _Tried, best: Found) -> Found:
    """Changes one thing at a time as long as that helps."""
    while True:
        before = best[0]
        for order in sorted(_moves(_order(best[1]), workers), key=lambda order: _hops(costs, order)):
            best = tried.take(order, best)
            if best[0] < before or tried.left <= 0:
                break
        if best[0] >= before or tried.left <= 0:
            return best


class _Tried:
    """What orders take. `left`: visits, and orders, that may still be tried."""

    def __init__(self, search: Search) -> None:
        self._search = search
        self._kept: dict[Order, Fronts] = {(): search.start()}
        self._seen: set[Order] = set()
        self._least = _least_times(search.costs)
        self.left = VISITS // search.size

    def take(self, order: Order, best: Found) -> Found:
        """The way over all of these workers in this order, if it is cheaper than `best`."""
        self.left -= 1
        if order in self._seen:
            return best
        self._seen.add(order)
        fronts = self._kept[()]
        for stop in range(1, len(order) + 1):
            if stop > 1 and self._promise(fronts) >= best[0]:
                return best
            fronts = self._after(order[:stop], fronts)
        return min(best, self._search.finish(fronts), key=lambda found: found[0])

    def _after(self, head: Order, before: Fronts) -> Fronts:
        if head not in self._kept:
            self.left -= 1
            self._kept[head] = self._search.settle({head[-1]: self._search.visit(before, head[-1])})
        return self._kept[head]

    def _promise(self, fronts: Fronts) -> float:
        """No way that goes on from here is cheaper."""
        return min(min(map(float.__add__, front.cost, self._least)) for front in fronts.values())


def _least_times(costs: Costs) -> list[float]:
    """For every layer what those from it on take at least, each where it is fastest."""
    devices = [device for node in costs.nodes for device in node.devices]
    least = [0.0]
    for layer in range(costs.layers - 1, -1, -1):
        least.append(least[-1] + min(device.time[layer + 1] - device.time[layer] for device in devices))
    return least[::-1]


def _order(way: Way | None) -> Order:
    return tuple(node for node in dict.fromkeys(step[0] for step in steps(way)) if node != MASTER_INDEX)


def _hops(costs: Costs, order: Order) -> float:
    return sum(costs.hop[one][other] for one, other in pairwise((MASTER_INDEX, *order, MASTER_INDEX)))


def _moves(order: Order, workers: Sequence[int]) -> set[Order]:
    """Orders that differ in one thing."""
    found: set[Order] = set()
    for node in workers:
        rest = tuple(other for other in order if other != node)
        found.add(rest)
        found |= {(*rest[:place], node, *rest[place:]) for place in range(len(rest) + 1)}
        found |= {(*rest[:place], node, *rest[place + 1 :]) for place in range(len(rest))}
    found |= set(_turned(order))
    return found - {order}


def _turned(order: Order) -> Iterator[Order]:
    for start, stop in combinations(range(len(order)), 2):
        swapped = list(order)
        swapped[start], swapped[stop] = order[stop], order[start]
        yield tuple(swapped)
        if stop - start < TURNED:
            yield (*order[:start], *order[start : stop + 1][::-1], *order[stop + 1 :])


def _shaken(order: Order, workers: Sequence[int], rng: random.Random) -> Order:
    """With two workers drawn anew, and a stretch cut out and put in elsewhere."""
    changed = list(order)
    for _ in range(2):
        unused = [node for node in workers if node not in changed]
        if unused and changed:
            changed[rng.randrange(len(changed))] = rng.choice(unused)
    start, stop = sorted(rng.randrange(len(changed) + 1) for _ in range(2))
    rest, stretch = changed[:start] + changed[stop:], changed[start:stop]
    place = rng.randrange(len(rest) + 1)
    return (*rest[:place], *stretch, *rest[place:])
