"""A worker: a process that serves some layers of a model to any number of masters.

Each master has its own sessions; what it opened is closed when its link ends. Work is done in the thread that reads the
master's link, under the stage's lock, and the result is sent from there.
"""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, cast

from cake_core import __version__
from cake_core.checkpoint import Checkpoint
from cake_core.errors import CakeError, ConfigError, TransportError
from cake_core.guest import Guest
from cake_core.link import Link, LinkTiming
from cake_core.model import Component, ImageBackend, LoadOptions, ModelInfo, TextBackend
from cake_core.placement import Placement
from cake_core.plugins import Plugins
from cake_core.protocol import Type
from cake_core.stages import LocalStage
from cake_core.topology import Topology
from cake_core.transport import Channel

log = logging.getLogger(__name__)

LayerProgress = Callable[[str, int, int], None]
"""`progress(layers, done, total)` in bytes."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker serves: the layers that `topology` gives to the node `name`, or `layers` when given."""

    checkpoint: Checkpoint
    topology: Topology
    name: str
    options: LoadOptions = field(default_factory=LoadOptions)
    model_type: str | None = None


class ChannelSource(Protocol):
    """Where authenticated channels come from (cake_core.security.Gate)."""

    def accept(self) -> tuple[Channel, bytes]: ...

    def close(self) -> None: ...


class Worker:
    """Load it, then give it a gate to serve."""

    def __init__(self, plugins: Plugins, spec: WorkerSpec, timing: LinkTiming | None = None) -> None:
        node = spec.topology.node(spec.name)
        self.name = spec.name
        self.backend = plugins.backend_for(spec.checkpoint, spec.model_type)
        self.info: ModelInfo = self.backend.describe(spec.checkpoint, spec.options)
        self.placement: Placement = plugins.plan(self.info, spec.topology)
        self.layers = self.placement.layers_of(spec.name)
        if not self.layers:
            raise ConfigError(f"node {node.name!r} has no layers in {spec.topology.source or 'the topology'}; give it some")
        self.stages: list[LocalStage] = []
        self.components: dict[str, Component] = {}
        self.component_lock = threading.Lock()
        self.fingerprints: dict[str, str] = {}
        self._spec = spec
        self._timing = timing
        self._guests: set[Guest] = set()
        self._lock = threading.Lock()
        self._draining = False
        self._gate: ChannelSource | None = None

    @property
    def spans(self) -> list[tuple[str, ...]]:
        """Layers of each stage, or of each component."""
        return [span.layers for span in self.placement.spans if self.name in span.nodes]

    def load(self, progress: LayerProgress | None = None) -> None:
        """Loads the layers. Raises CapacityError before loading when they do not fit."""
        spec = self._spec
        tensors = spec.checkpoint.tensors
        for name in self.layers:
            held = [tensor for tensor in self.info.layer(name).tensors if tensor in tensors]
            self.fingerprints[name] = spec.checkpoint.fingerprint(held)[:32]
        for layers in self.spans:
            report = None if progress is None else _bind(progress, ", ".join(layers))
            if self.info.model_type == "text":
                text = cast("TextBackend", self.backend)
                stage = text.load(spec.checkpoint, self.info, layers, spec.options, report)
                self.stages.append(LocalStage(self.name, stage))
            else:
                image = cast("ImageBackend", self.backend)
                self.components[layers[0]] = image.load(spec.checkpoint, self.info, layers[0], spec.options, report)

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

    def adopt(self, channel: Channel) -> Link:
        """Serves a master over an authenticated channel, whoever dialled."""
        guest = Guest(self)
        link = Link(channel, f"master at {channel.peer}", guest.handle, self._gone, self._timing)
        guest.link = link
        with self._lock:
            self._guests.add(guest)
        log.info("%s connected", channel.peer)
        link.start()
        return link

    def _gone(self, link: Link, error: CakeError) -> None:
        log.info("%s left: %s", link.name, error)
        with self._lock:
            guests = [guest for guest in self._guests if guest.link is link]
            self._guests.difference_update(guests)
        for guest in guests:
            guest.release()

    @property
    def sessions(self) -> int:
        """Sessions open for all masters together."""
        with self._lock:
            return sum(len(guest.sessions) for guest in self._guests)

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
        for stage in self.stages:
            stage.shutdown()
        for component in self.components.values():
            component.shutdown()

    def report(self) -> dict[str, Any]:
        """What an ATTACHED or REPORT says of this worker."""
        parts: list[LocalStage] | list[Component] = self.stages or list(self.components.values())
        return {
            "name": self.name,
            "identity": dict(self.info.identity),
            "fingerprints": self.fingerprints,
            "memory": [asdict(part.memory()) for part in parts],
            "platform": {
                "version": __version__,
                "system": platform.system(),
                "machine": platform.machine(),
                "sessions": self.sessions,
            },
        }


def _bind(progress: LayerProgress, layers: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(layers, done, total)
