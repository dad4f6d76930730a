"""Layers of a lost node, placed again on nodes that have memory to spare: `--on-loss replan`.

A node that stays away for a moment gives its layers to others. These fetch the weights and load them, the engine goes on over
the new stages, and live requests are computed again from their tokens, as after any loss.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cake_core.cluster.chain import Router
from cake_core.cluster.nodes import Nodes
from cake_core.cluster.survey import survey
from cake_core.engine.text import TextEngine
from cake_core.errors import CakeError, CapacityError
from cake_core.model import ModelInfo
from cake_core.placement import Placement
from cake_core.plugins import Plugins
from cake_core.profiles import NodeProfile
from cake_core.spreading import ROOM
from cake_core.stages.stage import LocalStage, RemoteStage, Stage
from cake_core.topology import MASTER, Node, Topology
from cake_core.wire.protocol import Type

if TYPE_CHECKING:
    from cake_core.runtime import RunSpec

log = logging.getLogger(__name__)

GRACE = 2.0
"""Seconds that a node may be down before its layers go elsewhere: a link that was only cut is back sooner."""
AGAIN = 5.0
"""Seconds after an attempt that failed."""
ASK = 60.0
DIAL = 5.0
CONTEXT = 4096

LoadLocal = Callable[[tuple[str, ...]], LocalStage]


def give_away(info: ModelInfo, topology: Topology, lost: Sequence[str], room: Mapping[str, int], kv_tokens: int) -> Topology:
    """The topology without the lost nodes, their layers given to nodes of `room` (bytes; the master may be one), in runs as
    long as fit, the node with the most room first. Nodes of `room` that the topology lacks have no host. Pure.

    Raises CapacityError, with the numbers, when they do not fit.
    """
    listed = {layer for node in topology.nodes if node.name in lost for layer in node.layers}
    todo = [layer for layer in info.layers if layer.name in listed]
    left = dict(room)
    given: dict[str, list[str]] = {name: [] for name in room}
    names = iter(sorted(room, key=lambda name: -room[name]))
    name = next(names, None)
    for layer in todo:
        size = layer.nbytes + layer.kv_bytes_per_token * kv_tokens
        while name is not None and left[name] < size:
            name = next(names, None)
        if name is None:
            need = sum(other.nbytes + other.kv_bytes_per_token * kv_tokens for other in todo)
            raise CapacityError(
                f"the layers of {', '.join(lost)} take {need / 1e9:.2f} GB, {sum(room.values()) / 1e9:.2f} GB are to spare on "
                f"{', '.join(room) or 'no other node'}; waiting for {', '.join(lost)}"
            )
        left[name] -= size
        given[name].append(layer.name)
    nodes = [replace(n, layers=(*n.layers, *given.pop(n.name, ()))) for n in topology.nodes if n.name not in lost]
    nodes += [Node(name, None, tuple(layers)) for name, layers in given.items() if layers and name != MASTER]
    return Topology(tuple(nodes), topology.source)


@dataclass(slots=True)
class Cast:
    """What takes part now. Only the replanner's thread changes it."""

    spec: RunSpec
    placement: Placement
    local: list[LocalStage]


class Replanner:
    """Watches the nodes of a text model in a thread of its own. `changed(cast)` is told of every new cast."""

    def __init__(
        self, plugins: Plugins, info: ModelInfo, nodes: Nodes, cast: Cast, load: LoadLocal, changed: Callable[[Cast], None]
    ) -> None:
        self._plugins, self._info, self._nodes = plugins, info, nodes
        self._cast = cast
        self._load = load
        self._changed = changed
        self._spares = {node.name: node for node in cast.spec.spares}
        self._woken, self._closed = threading.Event(), threading.Event()
        self._engine: TextEngine | None = None
        self._thread = threading.Thread(target=self._watch, name="cake-replan", daemon=True)

    def start(self, engine: TextEngine) -> None:
        self._engine = engine
        self._nodes.listen(self._woken.set)
        self._thread.start()

    def close(self) -> None:
        """Ends the watch; an attempt that is under way ends with the links."""
        self._closed.set()
        self._woken.set()

    def join(self) -> None:
        self._thread.join(10.0)

    def _watch(self) -> None:
        grace = min(GRACE, self._cast.spec.rejoin / 2)
        while not self._closed.is_set():
            self._woken.wait(grace / 4 if self._nodes.missing() else None)
            self._woken.clear()
            lost = [node.name for node in self._nodes.lost(time.time() - grace)]
            if not lost or self._closed.is_set():
                continue
            try:
                self._replace(lost)
            except CakeError as error:
                log.warning("not placed again: %s", error)
                self._closed.wait(min(AGAIN, grace))
            finally:
                self._nodes.replanning = False
                self._nodes_changed()

    def _nodes_changed(self) -> None:
        if self._engine is not None:
            self._engine.wake()

    def _replace(self, lost: list[str]) -> None:
        spec = self._cast.spec
        kv_tokens = spec.options.kv_tokens or spec.options.context or min(self._info.context_length, CONTEXT)
        topology = give_away(self._info, spec.topology, lost, self._room(lost), kv_tokens)
        hosts = {name: spare.host for name, spare in self._spares.items()}
        topology = replace(
            topology, nodes=tuple(replace(n, host=n.host or hosts.get(n.name)) for n in topology.nodes if n.layers)
        )
        self._nodes.replanning = True
        log.warning("placing the layers of %s on other nodes", ", ".join(lost))
        self._spares |= {node.name: replace(node, layers=()) for node in spec.topology.nodes if node.name in lost}
        cast = Cast(replace(spec, topology=topology), self._plugins.plan(self._info, topology), list(self._cast.local))
        self._cast.spec, self._cast.placement = cast.spec, cast.placement  # also should this attempt fail
        self._nodes.exchange(cast.spec, cast.placement)
        stages = self._stages(cast)
        self._nodes.wait_loaded()
        if self._engine is None or self._closed.is_set():
            return
        hosts = {node.name: node.host for node in topology.nodes}
        self._engine.restage(tuple(stages), Router(stages, spec.route, hosts))
        self._cast = cast
        self._changed(cast)

    def _room(self, lost: Sequence[str]) -> dict[str, int]:
        """Bytes to spare on the nodes that can take layers: bare workers that are up, spare ones, the master."""
        found: dict[str, int] = {}
        if self._cast.spec.profile is not None:
            found[MASTER] = int(self._cast.spec.profile(self._info.backend).memory_free * ROOM)
        for name in (node.name for node in self._cast.spec.topology.nodes if node.name not in lost):
            profile = self._ask(name)
            if profile is not None:
                found[name] = int(profile.memory_free * ROOM)
        for name, spare in self._spares.items():
            profile = None if name in found or name in lost else self._knock(spare)
            if profile is not None:
                found[name] = int(profile.memory_free * ROOM)
        return found

    def _ask(self, name: str) -> NodeProfile | None:
        """What a node of the placement has free, None where it brought layers of its own or does not say."""
        try:
            link = self._nodes[name].link()
            if link.ask(Type.STATUS).result(ASK)[0].fields["report"].get("bare") is not True:
                return None
            return NodeProfile.from_fields(
                link.ask(Type.PROFILE, {"backend": self._info.backend}).result(ASK)[0].fields["profile"], name
            )
        except (CakeError, TimeoutError) as error:
            log.info("%s takes no layers: %s", name, error)
            return None

    def _knock(self, spare: Node) -> NodeProfile | None:
        """The same of a worker that has no part so far."""
        spec = self._cast.spec
        try:
            if spare.host is not None and spec.dial is not None:
                worker = survey(spec.dial(spare.host, DIAL), spare.host, spec.timing, self._info.backend)
            elif spec.joined is not None:
                worker = survey(spec.joined(spare.name, DIAL), None, spec.timing, self._info.backend)
            else:
                return None
        except CakeError as error:
            log.info("%s takes no layers: %s", spare.name, error)
            return None
        return worker.profile if worker.bare and not worker.held_by else None

    def _stages(self, cast: Cast) -> list[Stage]:
        """The stages of the new placement; local ones that are loaded stay as they are, what is added is loaded beside them."""
        stages: list[Stage] = []
        indices: dict[str, int] = {}
        loaded = {stage.layers[0]: stage for stage in cast.local}
        for span in cast.placement.spans:
            if span.node != MASTER:
                index = indices.get(span.node, 0)
                indices[span.node] = index + 1
                stages.append(RemoteStage(self._nodes[span.node], index, span.layers))
                continue
            layers = list(span.layers)
            while layers:
                stage = loaded.get(layers[0])
                if stage is None:
                    until = next((at for at, layer in enumerate(layers) if layer in loaded), len(layers))
                    stage = self._load(tuple(layers[:until]))
                    cast.local.append(stage)
                stages.append(stage)
                del layers[: len(stage.layers)]
        return stages
