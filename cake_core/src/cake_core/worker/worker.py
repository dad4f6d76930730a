"""A worker: a process that serves some layers of a model to any number of masters.

Each master has its own sessions. When its link ends they are kept for a moment, should it be back, and closed then. Work is
done in the thread that reads the master's link, under the stage's lock, and the result is sent from there.
"""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from cake_core import __version__
from cake_core.checkpoint import Checkpoint
from cake_core.errors import CakeError, ConfigError, NodeMismatch, StageError, TransportError
from cake_core.links.link import Link, LinkTiming
from cake_core.model import LoadOptions
from cake_core.plugins import Plugins
from cake_core.profiles import NodeProfile
from cake_core.topology import Topology
from cake_core.transport import Channel
from cake_core.wire.protocol import Message, Type
from cake_core.worker.guest import Guest
from cake_core.worker.hops import Dial, Forward, Hops
from cake_core.worker.host import Again
from cake_core.worker.serving import LayerProgress, Serving, ServingSpec
from cake_core.worker.tenant import Means, Tenant

log = logging.getLogger(__name__)

RELIEVED = 20.0
"""Seconds to wait for the end of a master's former link; sessions that are not parked by then are computed again."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """A worker that serves the layers that `topology` gives to the node `name`."""

    checkpoint: Checkpoint
    topology: Topology
    name: str
    options: LoadOptions = field(default_factory=LoadOptions)
    model_type: str | None = None


@dataclass(frozen=True, slots=True)
class BareSpec:
    """A worker that brings no model: masters assign its layers."""

    name: str
    means: Means


class ChannelSource(Protocol):
    """Where authenticated channels come from (cake_core.security.Gate)."""

    def accept(self) -> tuple[Channel, bytes]: ...

    def close(self) -> None: ...


class Worker:
    """Load it, then give it a gate to serve. One made for a BareSpec waits for a master to assign layers.

    `dial` reaches other workers: the next one of a chain, and those that have weights already; without it there are none.
    """

    def __init__(
        self,
        plugins: Plugins,
        spec: WorkerSpec | BareSpec,
        timing: LinkTiming | None = None,
        dial: Dial | None = None,
    ) -> None:
        self.name = spec.name
        self._planned = _planned(plugins, spec) if isinstance(spec, WorkerSpec) else None
        self._tenant = Tenant(plugins, spec.name, spec.means, timing, dial) if isinstance(spec, BareSpec) else None
        self.bare = self._tenant is not None
        """Whether it brought no layers."""
        self.profile: Callable[[str], NodeProfile] | None = None
        """What was measured of this machine, for masters that ask."""
        self._timing = timing
        self._dial = dial
        self._guests: set[Guest] = set()
        self._lock = threading.Lock()
        self._draining = False
        self._gate: ChannelSource | None = None

    def load(self, progress: LayerProgress | None = None) -> Serving:
        """Loads the layers that the topology gives. Raises CapacityError before loading when they do not fit."""
        if self._planned is None:
            raise ConfigError(f"{self.name} has no layers to load before a master assigns some")
        self._planned.load(progress)
        return self._planned

    @property
    def serving(self) -> Serving | None:
        """What is loaded now."""
        return self._planned if self._tenant is None else self._tenant.serving

    def tenant(self) -> Tenant:
        """Who carries out assignments. Raises NodeMismatch for a worker that brought its own layers."""
        if self._tenant is None:
            raise NodeMismatch(
                f"{self.name} was started with layers of its own; start `cake worker` there without --model and --topology"
            )
        return self._tenant

    def holders(self, but: Guest | None = None) -> list[str]:
        """The masters that are attached, but for this one."""
        with self._lock:
            return [guest.link.name for guest in self._guests if guest is not but and guest.attached and guest.link.up]

    def serve(self, gate: ChannelSource) -> None:
        """Serves every master that comes through the gate, until `shutdown`."""
        self._gate = gate
        while not self._draining:
            try:
                channel, _hello = gate.accept()
            except TransportError:
                break
            self.adopt(channel)
        gate.close()

    def adopt(self, channel: Channel, again: Again | None = None) -> Link:
        """Serves a master over an authenticated channel, whoever dialled. `again` dials one that cannot dial us."""
        guest = Guest(self, again)
        link = Link(channel, f"master at {channel.peer}", guest.handle, self._gone, self._timing)
        guest.link = link
        guest.hops = Hops(link, self._dial, self._timing or LinkTiming())
        with self._lock:
            self._guests.add(guest)
            late = self._draining
        log.info("%s connected", channel.peer)
        link.start()
        if late:  # nobody else would end it
            link.close()
        return link

    def join(self, again: Again | None, link: Link, message: Message) -> None:
        """Answers a JOIN, in a thread, once the master was dialled again. Raises StageError for one that dialled us."""
        if again is None:
            raise StageError(f"{self.name} did not join this master, and does not dial it")
        threading.Thread(target=self._join, args=(again, link, message), name="cake-join", daemon=True).start()

    def _join(self, again: Again, link: Link, message: Message) -> None:
        try:
            self.adopt(again(message.fields["ticket"]))
        except CakeError as error:
            link.answer_error(message, error)
        else:
            link.answer(message, Type.READY, {})

    def _gone(self, link: Link, error: CakeError) -> None:
        """In the link's thread. The guest stays known until it is released: `relieve` and `shutdown` wait for that."""
        log.info("%s left: %s", link.name, error)
        with self._lock:
            guests = [guest for guest in self._guests if guest.link is link]
        try:
            for guest in guests:
                guest.release()
        finally:
            with self._lock:
                self._guests.difference_update(guests)

    def claim(self, ticket: bytes, link: Link) -> Forward:
        """Who takes the batches that come over `link` with this ticket. Raises StageError for one that nobody gave."""
        with self._lock:
            guests = list(self._guests)
        for guest in guests:
            stage = guest.hops.claim(ticket, link)
            if stage is not None:
                return partial(guest.take_over, stage)
        raise StageError(f"{self.name} expects nobody with that ticket")

    def relieve(self, guest: Guest) -> None:
        """A master is back over another link: ends its former ones, which may only seem to stand, so that its sessions are
        parked. That waits for a batch under way, as the stage's next one would."""
        with self._lock:
            former = [other for other in self._guests if other is not guest and other.token == guest.token]
        for other in former:
            other.link.close()
            other.link.join(RELIEVED)

    @property
    def sessions(self) -> int:
        """Sessions open for all masters together."""
        with self._lock:
            return sum(len(guest.sessions) for guest in self._guests)

    @property
    def parked(self) -> int:
        """Sessions kept for masters whose links fell."""
        return 0 if self.serving is None else self.serving.parking.count

    def shutdown(self, drain: float = 0.0) -> None:
        """Stops accepting, tells the masters, waits up to `drain` seconds for open sessions to end, then frees everything."""
        self._draining = True
        if self._gate is not None:
            self._gate.close()
        with self._lock:
            guests = list(self._guests)
        for guest in guests:
            guest.link.tell(Type.DRAINING)
        until = time.monotonic() + drain
        while self.sessions and time.monotonic() < until:
            time.sleep(0.05)
        for guest in guests:
            guest.link.close()
            guest.link.join()
        if self._tenant is not None:
            self._tenant.close()
        elif self.serving is not None:
            self.serving.shutdown()

    def report(self) -> dict[str, Any]:
        """What an ATTACHED or REPORT says of this worker."""
        nothing: dict[str, Any] = {"model": "", "identity": {}, "fingerprints": {}, "memory": []}
        return {
            "name": self.name,
            "bare": self.bare,
            "held_by": self.holders(),
            **(nothing if self.serving is None else self.serving.report()),
            "platform": {
                "version": __version__,
                "system": platform.system(),
                "machine": platform.machine(),
                "sessions": self.sessions,
                "parked": self.parked,
            },
        }


def _planned(plugins: Plugins, spec: WorkerSpec) -> Serving:
    """What the topology gives to the node, described and not yet loaded."""
    node = spec.topology.node(spec.name)
    backend = plugins.backend_for(spec.checkpoint, spec.model_type)
    placement = plugins.plan(backend.describe(spec.checkpoint, spec.options), spec.topology)
    if not placement.layers_of(spec.name):
        raise ConfigError(f"node {node.name!r} has no layers in {spec.topology.source or 'the topology'}; give it some")
    spans = tuple(span.layers for span in placement.spans if spec.name in span.nodes)
    return Serving(plugins, ServingSpec(spec.checkpoint, spec.name, spans, spec.options, spec.model_type))
