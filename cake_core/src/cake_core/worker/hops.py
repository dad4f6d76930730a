"""Hand-overs between workers, the workers' side: where a stage's output goes on to, and who may bring a stage its input.

The master tells one worker to expect a ticket and the next one to bring it. It is good once; the channel it comes over is
authenticated like every other, and reaches only the sessions of the master that gave it, at the one stage it was given for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from cake_core.errors import CakeError, NodeLost, NodeUnreachable, ProtocolError
from cake_core.links.link import Link, LinkTiming
from cake_core.model import Batch, Pending, Tensor
from cake_core.stages.inputs import carried
from cake_core.transport import Address, Channel
from cake_core.wire.protocol import Message, Type

log = logging.getLogger(__name__)

HOP_TIMEOUT = 2.0
"""Seconds a worker tries to reach the next one."""

Dial = Callable[[Address, float], Channel]
Forward = Callable[[Message, memoryview], None]


class Hop:
    """The way from a stage to the next worker. `on_lost` is called once if it is lost rather than closed."""

    def __init__(self, ticket: bytes, stage: int, on_lost: Callable[[Hop, CakeError], None]) -> None:
        self.ticket = ticket
        self._stage = stage
        self._on_lost = on_lost
        self._link: Link | None = None
        self._closed = False

    def reach(self, channel: Channel, timing: LinkTiming) -> None:
        """Shows the ticket. Raises a CakeError when it is not taken."""
        self._link = link = Link(channel, f"the next worker at {channel.peer}", self._handle, self._down, timing)
        link.start()
        try:
            link.ask(Type.PEER, {"ticket": self.ticket}).result(HOP_TIMEOUT)
        except TimeoutError:
            self.close()
            raise NodeUnreachable(f"the next worker at {channel.peer} does not take the hand-over") from None
        except CakeError:
            self.close()
            raise

    def pass_on(self, number: int, batch: Batch, hops: int) -> None:
        """Raises NodeLost when the next worker is gone; after that a loss is told by `on_lost`."""
        link = self._link
        if link is not None:
            link.send_batch(number, batch, self._stage, hops)
        if link is None or not link.up:
            raise NodeLost("the next worker of the chain is gone")

    def close(self) -> None:
        self._closed = True
        if self._link is not None:
            self._link.close()
            self._link.join()

    def _handle(self, link: Link, message: Message, _body: memoryview) -> None:
        if message.type is not Type.DRAINING:  # the master is told so too
            raise ProtocolError(f"the next worker does not send {message.type.name}")

    def _down(self, _link: Link, error: CakeError) -> None:
        if not self._closed:
            self._on_lost(self, error)


class Hops:
    """Those of one master: `link` is the master's."""

    def __init__(self, link: Link, dial: Dial | None, timing: LinkTiming) -> None:
        self._link = link
        self._dial = dial
        self._timing = timing
        self._tickets: dict[bytes, int] = {}
        self._sources: dict[int, Link] = {}
        self._next: dict[int, Hop] = {}

    def expect(self, stage: int, fields: Mapping[str, Any]) -> None:
        """From now on only the worker with this ticket may bring the stage its input."""
        for ticket, other in list(self._tickets.items()):  # which another worker's thread may claim meanwhile
            if other == stage:
                self._tickets.pop(ticket, None)
        self._tickets[fields["ticket"]] = stage
        self._drop_source(stage)

    def claim(self, ticket: bytes, link: Link) -> int | None:
        """The stage whose input comes over `link` from now on, if that is what the ticket says."""
        stage = self._tickets.pop(ticket, None)
        if stage is not None:
            self._sources[stage] = link
        return stage

    def go_on(self, stage: int, fields: Mapping[str, Any]) -> None:
        """Has the stage's output handed to the next worker. Raises a CakeError when that cannot be reached."""
        former = self._next.pop(stage, None)
        if former is not None:
            former.close()
        if self._dial is None:
            raise NodeUnreachable("this worker dials nobody")
        hop = Hop(fields["ticket"], fields["stage"], self._lost)
        hop.reach(self._dial(Address.parse(fields["host"]), HOP_TIMEOUT), self._timing)
        self._next[stage] = hop

    def deliver(self, request: Message, tensors: Mapping[str, Tensor], done: Pending) -> None:
        """Sends a stage's output where it belongs: to the next worker of the chain, or to the master."""
        try:
            result = done.result().tensors
            if not request.hops:
                self._link.answer_batch(request, Batch((), result))
                return
            hop = self._next.get(request.stage)
            if hop is None:
                raise NodeLost("there is no next worker to hand over to")
            hop.pass_on(request.request, Batch(request.rows, {**result, **carried(tensors)}), request.hops - 1)
        except CakeError as error:
            self._link.answer_error(request, error)
        except Exception as error:
            log.exception("a batch of %s failed", self._link.name)
            self._link.answer_error(request, error)

    def release(self) -> None:
        """The master is gone."""
        self._tickets.clear()
        for stage in list(self._sources):
            self._drop_source(stage)
        hops, self._next = self._next, {}
        for hop in hops.values():
            hop.close()

    def _drop_source(self, stage: int) -> None:
        link = self._sources.pop(stage, None)
        if link is not None:
            link.close()

    def _lost(self, hop: Hop, error: CakeError) -> None:
        log.info("%s: a hand-over is lost: %s", self._link.name, error)
        self._link.tell(Type.PARTED, {"ticket": hop.ticket, "message": str(error)})
