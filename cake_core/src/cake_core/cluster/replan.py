"""Layers of a lost node, placed again on nodes that have memory to spare: `--on-loss replan`.

A node that stays away for a moment gives its layers to others. These fetch the weights and load them, and the model goes on
over them: live texts are computed again from their tokens, as after any loss, and of an image the step that was lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cake_core.checkpoint import Checkpoint
from cake_core.cluster.cast import Cast
from cake_core.cluster.gathering import positions_of
from cake_core.cluster.nodes import Nodes
from cake_core.cluster.survey import survey
from cake_core.errors import CakeError, CapacityError, CheckpointError
from cake_core.model import Layer, ModelInfo
from cake_core.placement import Placement
from cake_core.plugins import Plugins
from cake_core.profiles import NodeProfile
from cake_core.spreading import ROOM, components
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


def orphans(topology: Topology, lost: Sequence[str]) -> set[str]:
    """The layers that only lost nodes hold. Pure."""
    kept = {layer for node in topology.nodes if node.name not in lost for layer in node.layers}
    return {layer for node in topology.nodes if node.name in lost for layer in node.layers} - kept


def give_away(info: ModelInfo, topology: Topology, lost: Sequence[str], room: Mapping[str, int], kv_tokens: int) -> Topology:
    """The topology without the lost nodes, the layers that nobody else holds given to nodes of `room` (bytes; the master may
    be one): those of a text model in runs as long as fit, the node with the most room first; components of an image model one
    by one, the largest first. Nodes of `room` that the topology lacks have no host. Pure.

    Raises CapacityError, with the numbers, when they do not fit.
    """
    left_alone = orphans(topology, lost)
    todo = [layer for layer in info.layers if layer.name in left_alone]
    sizes = [layer.nbytes + layer.kv_bytes_per_token * kv_tokens for layer in todo]
    share = components if info.model_type == "image" else _filled
    owners = share(todo, sizes, room) if room else []
    given: dict[str, list[str]] = {name: [] for name in room}
    left = dict(room)
    for layer, size, owner in zip(todo, sizes, owners, strict=False):
        given[owner].append(layer.name)
        left[owner] -= size
    if len(owners) < len(todo) or min(left.values(), default=0) < 0:
        raise CapacityError(
            f"the layers of {', '.join(lost)} take {sum(sizes) / 1e9:.2f} GB, {sum(room.values()) / 1e9:.2f} GB are to spare "
            f"on {', '.join(room) or 'no other node'}; waiting for {', '.join(lost)}"
        )
    nodes = [replace(n, layers=(*n.layers, *given.pop(n.name, ()))) for n in topology.nodes if n.name not in lost]
    nodes += [Node(name, None, tuple(layers)) for name, layers in given.items() if layers and name != MASTER]
    return Topology(tuple(nodes), topology.source)


def check_weights(info: ModelInfo, checkpoint: Checkpoint, layers: Collection[str], lost: Sequence[str]) -> None:
    """Raises CheckpointError unless this node has the weights of the layers to hand out: it may hold the part of a split model
    that has none."""
    wanted = {name: info.layer(name).tensors for name in layers}
    here = checkpoint.tensors if all(wanted.values()) else {}
    absent = [name for name, tensors in wanted.items() if not tensors or not set(tensors) <= here.keys()]
    if absent:
        raise CheckpointError(
            f"{checkpoint.name} has no weights of {', '.join(absent)} on this node, to be sent to another; "
            f"waiting for {', '.join(lost)}"
        )


def _filled(_layers: Sequence[Layer], sizes: Sequence[int], room: Mapping[str, int]) -> list[str]:
    """An owner for each of the layers, or for the first of them, as far as there is room."""
    left, owners = dict(room), list[str]()
    names = iter(sorted(room, key=lambda name: -room[name]))
    name = next(names, None)
    for size in sizes:
        while name is not None and left[name] < size:
            name = next(names, None)
        if name is None:
            break
        left[name] -= size
        owners.append(name)
    return owners


class Replanner:
    """Watches the nodes of a model that runs, in a thread of its own."""

    def __init__(self, plugins: Plugins, info: ModelInfo, nodes: Nodes, spec: RunSpec, cast: Cast) -> None:
        self._plugins, self._info, self._nodes = plugins, info, nodes
        self._spec, self._cast = spec, cast
        self._next: Placement | None = None
        """What the cast has still to enter; an attempt that failed leaves it here."""
        self._spares = {node.name: node for node in spec.spares}
        self._woken, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cake-replan", daemon=True)

    def start(self) -> None:
        self._nodes.listen(self._woken.set)
        self._thread.start()

    def close(self) -> None:
        """Ends the watch; an attempt that is under way ends with the links."""
        self._closed.set()
        self._woken.set()

    def join(self) -> None:
        self._thread.join(10.0)

    def _watch(self) -> None:
        grace, said = min(GRACE, self._spec.rejoin / 2), ""
        while not self._closed.is_set():
            self._woken.wait(grace / 4 if self._next is not None or self._nodes.missing() else None)
            self._woken.clear()
            lost = [node.name for node in self._nodes.lost(time.time() - grace)]
            if self._closed.is_set() or not (self._next is not None or orphans(self._spec.topology, lost)):
                continue
            try:
                self._replace(lost)
            except CakeError as error:
                log.log(logging.DEBUG if str(error) == said else logging.WARNING, "not placed again: %s", error)
                said = str(error)
                self._closed.wait(min(AGAIN, grace))
            except Exception:
                log.exception("layers of a lost node could not be placed again")
                self._closed.wait(AGAIN)
            finally:
                self._nodes.replanning = False
                self._cast.wake()

    def _replace(self, lost: Sequence[str]) -> None:
        if orphans(self._spec.topology, lost):
            self._give_away(lost)
        if self._next is None:
            return
        self._nodes.replanning = True
        self._cast.load(self._next)
        self._nodes.wait_loaded()
        if not self._closed.is_set():
            self._cast.enter(self._spec, self._next)
            self._next = None

    def _give_away(self, lost: Sequence[str]) -> None:
        """Finds other nodes for what the lost ones held, and has them fetch and load it."""
        spec = self._spec
        check_weights(self._info, spec.checkpoint, orphans(spec.topology, lost), lost)
        topology = give_away(self._info, spec.topology, lost, self._room(lost), positions_of(self._info, spec.options))
        hosts = {name: spare.host for name, spare in self._spares.items()}
        topology = replace(
            topology, nodes=tuple(replace(n, host=n.host or hosts.get(n.name)) for n in topology.nodes if n.layers)
        )
        placement = self._plugins.plan(self._info, topology)
        self._nodes.replanning = True
        log.warning("placing the layers of %s on other nodes", ", ".join(lost))
        self._spares |= {node.name: replace(node, layers=()) for node in spec.topology.nodes if node.name in lost}
        self._spec, self._next = replace(spec, topology=topology), placement
        self._nodes.exchange(self._spec, placement)

    def _room(self, lost: Sequence[str]) -> dict[str, int]:
        """Bytes to spare on the nodes that can take layers: bare workers that are up, spare ones, the master."""
        found: dict[str, int] = {}
        if self._spec.profile is not None:
            found[MASTER] = int(self._spec.profile(self._info.backend).memory_free * ROOM)
        for name in (node.name for node in self._spec.topology.nodes if node.name not in lost):
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
        spec = self._spec
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
