"""The master's side of an assignment: asks the worker, hands out files, lends it more links, waits until it has loaded."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from cake_core.assignment import Assignment
from cake_core.errors import CakeError, NodeUnreachable, ProtocolError
from cake_core.links.link import Link, LinkTiming
from cake_core.transport import Channel
from cake_core.weights.supply import Supply, serve_weights
from cake_core.wire.codec import error_from_fields
from cake_core.wire.protocol import Message, Type

log = logging.getLogger(__name__)

LENT = 2
"""Links beside the first over which weights travel."""
ANSWER_TIMEOUT = 30.0
DIAL_TIMEOUT = 5.0
PATIENCE = 0.2
"""Seconds before further links are lent."""

Report = Callable[[str, int, int], None]
"""`report(what, done, total)` in bytes; `what` is `fetching` or `loading`."""
Further = Callable[[Link, float], Channel]
"""`further(link, timeout)` gives one more channel to the worker at the other end of the link, whoever dials."""


class NodeAssigner:
    """For one node, however often it is connected. `make` works the assignment out when it is first needed. `further` opens
    more channels to it; None: there is only the one."""

    def __init__(
        self,
        node: str,
        make: Callable[[], Assignment],
        supply: Supply,
        further: Further | None = None,
        report: Report | None = None,
        timing: LinkTiming | None = None,
    ) -> None:
        self.received = 0
        """Bytes of weights that the worker fetched, from whomever, when it was last assigned."""
        self.active = False
        self._node = node
        self._make = make
        self._made: Assignment | None = None
        self._supply = supply
        self._further = further
        self._report = report
        self._timing = timing
        self._loaded = threading.Event()
        self._outcome: Mapping[str, Any] = {}

    def assign(self, link: Link) -> None:
        """Returns when the layers are loaded. Raises what keeps the worker from it, or the link's end."""
        self.active = True
        try:
            if self._made is None:
                self._made = self._make()
            self._assign(link, replace(self._made, ticket=secrets.randbits(62)))
        finally:
            self.active = False

    def _assign(self, link: Link, assignment: Assignment) -> None:
        self._loaded.clear()
        try:
            link.ask(Type.ASSIGN, assignment.as_fields()).result(ANSWER_TIMEOUT)
        except TimeoutError:
            raise NodeUnreachable(f"{self._node} does not answer; restart it", self._node) from None
        lent: list[Link] = []
        lender = threading.Thread(target=self._lend, args=(link, assignment.ticket, lent), name="cake-lend", daemon=True)
        lender.start()
        try:
            while not self._loaded.wait(0.2):
                if not link.up:
                    raise link.reason()
        finally:
            lender.join()
            for other in lent:
                other.close()
        if self._outcome["error"]:
            error = error_from_fields(self._outcome["error"])
            raise type(error)(f"{self._node}: {error}")
        self.received = self._outcome["received"]

    def handle(self, link: Link, message: Message) -> bool:
        """Takes a message of the worker that belongs to an assignment; False for others."""
        match message.type:
            case Type.FETCH | Type.HOLDS:
                self._serve(link, message)
            case Type.PROGRESS:
                if self._report is not None:
                    fields = message.fields
                    self._report(fields["what"], fields["done"], fields["total"])
            case Type.LOADED:
                self._outcome = message.fields
                self._loaded.set()
            case _:
                return False
        return True

    def _serve(self, link: Link, message: Message) -> None:
        try:
            serve_weights(self._supply, link, message)
        except CakeError as error:
            link.answer_error(message, error)

    def _lend(self, first: Link, ticket: int, lent: list[Link]) -> None:
        if self._loaded.wait(PATIENCE):
            return  # there was next to nothing to fetch
        for number in range(LENT if self._further is not None else 0):
            if self._loaded.is_set() or self._further is None or not first.up:
                return
            try:
                channel = self._further(first, DIAL_TIMEOUT)
                link = Link(channel, f"{self._node} (weights {number + 1})", self._lent, _ended, self._timing)
            except CakeError as error:
                log.info("no further link to %s for weights: %s", self._node, error)
                return
            link.start()
            lent.append(link)
            link.tell(Type.LEND, {"ticket": ticket})

    def _lent(self, link: Link, message: Message, _body: memoryview) -> None:
        if message.type is not Type.FETCH:
            raise ProtocolError(f"{link.name} is for weights, not for {message.type.name}")
        self._serve(link, message)


def _ended(link: Link, error: CakeError) -> None:
    log.debug("%s: %s", link.name, error)
