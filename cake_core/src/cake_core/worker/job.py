"""One assignment being carried out: who waits for it, how far it is, and who beside the master is asked for weights."""

from __future__ import annotations

import logging
import threading
import time

from cake_core.assignment import Assignment
from cake_core.errors import CakeError, ProtocolError
from cake_core.links.link import Link, LinkTiming
from cake_core.weights.supply import LinkSource
from cake_core.weights.transfer import Transfer
from cake_core.wire.protocol import Message, Type
from cake_core.worker.hops import Dial

log = logging.getLogger(__name__)

TOLD = 0.2
"""Seconds between two words of progress."""
PEER_TIMEOUT = 5.0


class Job:
    """One assignment being carried out. `links` are the masters that wait for it."""

    def __init__(self, assignment: Assignment, transfer: Transfer) -> None:
        self.assignment = assignment
        self.transfer = transfer
        transfer.report = lambda done, total: self.tell("fetching", done, total)
        self.links: list[Link] = []
        self.tickets: set[int] = set()
        self.invited = 0
        self.last = 0.0
        self._peers: list[Link] | None = []
        self._lock = threading.Lock()

    def end(self) -> None:
        """The transfer is over."""
        with self._lock:
            peers, self._peers = self._peers or [], None
        for link in peers:
            link.close()

    def tell(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last < TOLD and done < total:
            return
        self.last = now
        for link in self.links:
            link.tell(Type.PROGRESS, {"what": what, "done": done, "total": total})

    def told(self, error: dict[str, str]) -> None:
        """Tells all who wait that it is loaded, or why it is not."""
        for link in self.links:
            link.tell(Type.LOADED, {"received": self.transfer.received, "error": error})

    def meet(self, dial: Dial, timing: LinkTiming | None) -> None:
        """Asks other workers, in a thread, which of the files they have; those that do not answer are no loss."""
        threading.Thread(target=self._meet, args=(dial, timing), name="cake-peers", daemon=True).start()

    def _meet(self, dial: Dial, timing: LinkTiming | None) -> None:
        names = list({file.name for file in self.assignment.files})
        for address in self.assignment.sources:
            try:
                link = Link(dial(address, PEER_TIMEOUT), f"worker at {address}", _refuse, _ignore, timing)
                link.start()
                if not self._keep(link):
                    return
                answer, _ = link.ask(Type.HOLDS, {"files": names}).result(PEER_TIMEOUT)
                if held := set(names) & set(answer.fields["files"]):
                    self.transfer.add(LinkSource(link, held))
            except (CakeError, TimeoutError, TypeError) as error:
                log.info("%s has no weights for us: %s", address, error)

    def _keep(self, link: Link) -> bool:
        """Takes a link to another worker, to be closed with the transfer; closes it at once, and says so, when that is over."""
        with self._lock:
            if self._peers is not None:
                self._peers.append(link)
                return True
        link.close()
        return False


def _refuse(link: Link, message: Message, _body: memoryview) -> None:
    raise ProtocolError(f"{link.name} has no {message.type.name} to ask here")


def _ignore(link: Link, error: CakeError) -> None:
    log.debug("%s: %s", link.name, error)
