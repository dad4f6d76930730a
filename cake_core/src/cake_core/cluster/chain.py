"""How batches cross the stages, the master's side: each worker answers the master (star), or hands its output straight to the
next one (chain), which takes W + 1 messages a batch instead of 2 W.

A route is made when sessions are first opened over it and stays as it is until one of its links or hand-overs is lost. A
session lives on the route it was opened over: the next route starts with nothing, so what travels on the old one can neither
overtake nor be taken for anything of the new.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from cake_core.errors import CakeError, NodeUnreachable
from cake_core.links.link import Link
from cake_core.model import Batch, Pending, SessionSpec
from cake_core.stages.inputs import inputs_of, read_by
from cake_core.stages.stage import RemoteStage, Stage
from cake_core.transport import Address
from cake_core.wire.protocol import CHAINED, Message, Type

log = logging.getLogger(__name__)

Way = Literal["auto", "star", "chain"]
Places = tuple[tuple[str, tuple[str, ...]], ...]
"""Node and layers of each stage of a leg: what the leg is called, on this route and the next."""

HAND_OVER_TIMEOUT = 5.0
"""Seconds until two workers must have reached one another."""

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Leg:
    """Stages that a batch crosses without coming back to the master: one, or several neighbouring workers'."""

    stages: tuple[Stage, ...]
    places: Places
    reads: frozenset[str]
    """Tensors of a batch that any of its stages reads."""

    @classmethod
    def over(cls, stages: Sequence[Stage]) -> Leg:
        places = tuple((stage.node, stage.layers) for stage in stages)
        return cls(tuple(stages), places, read_by([name for _, layers in places for name in layers]))

    def submit(self, batch: Batch) -> Pending:
        """The answer of the last stage. It fails when any of the links falls, or a hand-over between them is lost."""
        first = self.stages[0]
        batch = Batch(batch.rows, inputs_of(self.reads, batch.tensors))
        if len(self.stages) == 1 or not isinstance(first, RemoteStage):
            return first.submit(batch)
        pending, number = Pending(), CHAINED | next(_numbers) % CHAINED
        for link in self.links():
            link.expect(number, pending, batch)
        if not pending.done():
            first.link.send_batch(number, batch, first.index, len(self.stages) - 1)
        return pending

    def links(self) -> list[Link]:
        return [stage.link for stage in self.stages if isinstance(stage, RemoteStage)]

    def open(self, session: int, spec: SessionSpec, parent: int | None, length: int) -> list[int]:
        """Opens the session on each stage; positions that each really has."""
        kept = [self.stages[0].open(session, spec, parent, length)]
        for stage in self.stages[1:]:
            # A batch comes here over another link than this, which it must not overtake.
            if parent is None and isinstance(stage, RemoteStage):
                stage.open_early(session, spec)
                kept.append(0)
            else:
                kept.append(stage.open(session, spec, parent, length))
        return kept

    def settle(self) -> None:
        """Waits until all that was opened is open."""
        for stage in self.stages[1:]:
            if isinstance(stage, RemoteStage):
                stage.settle()


@dataclass(frozen=True, slots=True)
class HandOver:
    """What a worker keeps up for us: the way from one link's stage to the next."""

    link: Link
    ticket: bytes

    @property
    def stands(self) -> bool:
        return self.ticket in self.link.hops


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    legs: tuple[Leg, ...]
    links: tuple[Link, ...] = ()
    hand_overs: tuple[HandOver, ...] = ()

    @property
    def up(self) -> bool:
        return all(link.up for link in self.links) and all(hop.stands for hop in self.hand_overs)

    @property
    def stages(self) -> list[Stage]:
        return [stage for leg in self.legs for stage in leg.stages]

    def __str__(self) -> str:
        return ", ".join(" -> ".join(stage.node for stage in leg.stages) for leg in self.legs)


class Router:
    """Makes routes over `stages`. `addresses` says where the workers that can be dialled listen. What could not be reached,
    or was lost, is not tried again before one of the two workers has a new link."""

    def __init__(
        self, stages: Sequence[Stage], way: Way = "auto", addresses: Mapping[str, Address | None] | None = None
    ) -> None:
        self._stages = tuple(stages)
        self._way = way
        self._addresses = addresses or {}
        self._tried: dict[tuple[Link, int, Link, int], HandOver] = {}

    def route(self) -> Route:
        """A route over the present links. Raises NodeError when a node has none."""
        bound = [stage.bound() for stage in self._stages]
        hand_overs = {} if self._way == "star" else self._reach(bound)
        legs: list[list[Stage]] = []
        for index, stage in enumerate(bound):
            if index in hand_overs:
                legs[-1].append(stage)
            else:
                legs.append([stage])
        links = tuple(stage.link for stage in bound if isinstance(stage, RemoteStage))
        return Route(tuple(Leg.over(leg) for leg in legs), links, tuple(hand_overs.values()))

    def require(self, route: Route) -> None:
        """Raises NodeUnreachable when a chain was asked for and there is none."""
        for before, after in pairwise(route.legs):
            ends = before.stages[-1], after.stages[0]
            if self._way == "chain" and all(isinstance(stage, RemoteStage) for stage in ends):
                name, node = (stage.node for stage in ends)
                raise NodeUnreachable(
                    f"{name} cannot hand over to {node}; give the node a host in the topology that {name} can dial, "
                    "or leave out --route chain",
                    node,
                )

    def _reach(self, stages: Sequence[Stage]) -> dict[int, HandOver]:
        """The hand-overs that stand, by the index of the stage they lead to; those not tried yet are asked for all at once."""
        self._tried = {pair: hop for pair, hop in self._tried.items() if pair[0].up and pair[2].up}
        asked: dict[int, tuple[HandOver, Future[tuple[Message, memoryview]]]] = {}
        found: dict[int, HandOver] = {}
        for index, (before, after) in enumerate(pairwise(stages), 1):
            address = self._addresses.get(after.node)
            if address is None or not isinstance(before, RemoteStage) or not isinstance(after, RemoteStage):
                continue
            pair = before.link, before.index, after.link, after.index
            if pair not in self._tried:
                self._tried[pair] = HandOver(before.link, secrets.token_bytes(16))
                asked[index] = self._tried[pair], _ask(before, after, self._tried[pair], address)
            elif self._tried[pair].stands:
                found[index] = self._tried[pair]
        return found | {index: hop for index, (hop, answer) in asked.items() if _stands(stages, index, hop, answer)}


def _ask(before: RemoteStage, after: RemoteStage, hop: HandOver, address: Address) -> Future[tuple[Message, memoryview]]:
    """Tells one worker to expect the other, and the other to come."""
    expected = after.link.ask(Type.EXPECT, {"ticket": hop.ticket}, after.index)
    if wait([expected], HAND_OVER_TIMEOUT).not_done or expected.exception() is not None:
        return expected
    hop.link.hops[hop.ticket] = after.node
    fields = {"ticket": hop.ticket, "host": str(address), "stage": after.index}
    return before.link.ask(Type.NEXT, fields, before.index)


def _stands(stages: Sequence[Stage], index: int, hop: HandOver, answer: Future[tuple[Message, memoryview]]) -> bool:
    try:
        answer.result(HAND_OVER_TIMEOUT)
    except (CakeError, TimeoutError) as error:
        hop.link.hops.pop(hop.ticket, None)
        log.info(
            "%s cannot hand over to %s, so its output goes by way of the master: %s",
            stages[index - 1].node, stages[index].node, error,
        )  # fmt: skip
        return False
    return True
