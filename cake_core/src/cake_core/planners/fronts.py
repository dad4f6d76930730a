"""Fronts: for every number of layers covered so far the least seconds, and the way to it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from cake_core.planners.costs import DeviceCosts

Way = tuple["Way | None", int, int, int, int]
"""The last step of a way: the way before it, node, device, first layer, layer after the last."""


Step = tuple[int, int, int, int]
"""Node, device, first layer, layer after the last."""


@dataclass(slots=True)
class Front:
    cost: list[float]
    way: list[Way | None]


Fronts = dict[int, Front]
"""By the node that was visited last."""
Visited = frozenset[int]
Found = tuple[float, Way | None]
"""Seconds, and the way that takes them."""
NOTHING: Found = (math.inf, None)


def run(device: DeviceCosts, low: Sequence[int], front: Front, here: tuple[int, int]) -> Front:
    """One run of at least one layer on a device, for every stop."""
    time, overhead, size = device.time, device.overhead, len(low) - 1
    cost: list[float] = [math.inf] * (size + 1)
    way: list[Way | None] = [None] * (size + 1)
    window: deque[tuple[float, int]] = deque()
    for stop in range(1, size + 1):
        value = front.cost[stop - 1] - time[stop - 1]
        if value < math.inf:
            while window and window[-1][0] >= value:
                window.pop()
            window.append((value, stop - 1))
        while window and window[0][1] < low[stop]:
            window.popleft()
        if window:
            least, begin = window[0]
            cost[stop] = least + time[stop] + overhead
            way[stop] = (front.way[begin], *here, begin, stop)
    return Front(cost, way)


def least(one: Front, other: Front) -> Front:
    """Of two fronts the cheaper at every place, the first where they are equal."""
    cost, way = one.cost.copy(), one.way.copy()
    for index, value in enumerate(other.cost):
        if value < cost[index]:
            cost[index], way[index] = value, other.way[index]
    return Front(cost, way)


def appended(before: Way | None, way: Way | None) -> Way | None:
    return before if way is None else (appended(before, way[0]), *way[1:])


def steps(way: Way | None) -> list[Step]:
    """The steps of a way, in order."""
    found = []
    while way is not None:
        before, *step = way
        found.append((step[0], step[1], step[2], step[3]))
        way = before
    return found[::-1]
