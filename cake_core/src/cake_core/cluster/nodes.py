"""The workers of a placement: each kept connected, assigned its layers where it brought none, and watched for the engine."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cake_core.assignment import Assignment
from cake_core.bundle import layer_files
from cake_core.cluster.assigner import Further, NodeAssigner
from cake_core.cluster.expectation import Expectation
from cake_core.cluster.node import Dial, RemoteNode
from cake_core.errors import CakeError, ConfigError, NodeLost, NodeUnreachable
from cake_core.events import NodeEvent
from cake_core.links.link import Link
from cake_core.links.reports import NodeStatus
from cake_core.model import ModelInfo
from cake_core.placement import Placement
from cake_core.plugins import Plugins
from cake_core.topology import MASTER
from cake_core.transport import Address, Channel
from cake_core.weights.supply import ImageSupply
from cake_core.wire.protocol import Type

if TYPE_CHECKING:
    from cake_core.runtime import RunSpec

FIRST_WAIT = 5.0
"""Seconds that a node gets to say that it is there, even to a master that does not wait."""


class Nodes:
    """The workers of a placement, and the watch the engine keeps on them."""

    def __init__(self, spec: RunSpec, plugins: Plugins, info: ModelInfo, placement: Placement) -> None:
        self.replanning = False
        """Whether lost layers are being placed again: that may take as long as it takes."""
        self.supply = ImageSupply()
        self._spec = spec
        self._info = info
        self._plugins = plugins
        self._listeners: list[Callable[[], None]] = []
        self._states: dict[str, str] = {}
        self._nodes: dict[str, RemoteNode] = {}
        for name in placement.nodes:
            if name != MASTER:
                self._nodes[name] = _remote_node(spec, info, placement, name, self)

    @property
    def rejoin(self) -> float:
        """Seconds that requests wait for a node that is missing: as long as it takes for one that is back and loads."""
        loading = any(node.loading for node in self._nodes.values())
        return math.inf if self.replanning or loading else self._spec.rejoin

    def exchange(self, spec: RunSpec, placement: Placement) -> None:
        """Goes over to another placement: ends what is not part of it or serves other layers there, starts what is new."""
        self._spec = spec
        kept = {name: node for name, node in self._nodes.items() if node.expectation.stages == _stages(placement, name)}
        gone = [node for name, node in self._nodes.items() if name not in kept]
        fresh = {
            name: _remote_node(spec, self._info, placement, name, self)
            for name in placement.nodes
            if name != MASTER and name not in kept
        }
        self._nodes = {**kept, **fresh}
        for node in gone:
            node.close()
        for node in fresh.values():
            node.start()

    def lost(self, since: float) -> list[RemoteNode]:
        """Those that have been away since that time (time.time()) or longer; one that is back and loads is not."""
        away = [node for node in self._nodes.values() if node.state in ("down", "connecting") and not node.loading]
        return [node for node in away if node.status().since <= since]

    def __getitem__(self, name: str) -> RemoteNode:
        return self._nodes[name]

    def connect(self, wait: float) -> None:
        """Connects to all, waiting up to `wait` seconds until each is there, loaded or not yet.

        Raises what keeps the first missing one away.
        """
        for node in self._nodes.values():
            node.start()
        until = time.monotonic() + max(wait, FIRST_WAIT if self._nodes else 0.0)
        for node in self._nodes.values():
            node.wait_known(0.0 if not wait and node.error else until - time.monotonic())

    def wait_loaded(self) -> None:
        """Waits, as long as it takes, for those that fetch and load what they were assigned. Raises what keeps one from it."""
        for node in self._nodes.values():
            node.wait_up(FIRST_WAIT)

    @property
    def draining(self) -> bool:
        return any(node.state == "draining" for node in self._nodes.values())

    def missing(self) -> CakeError | None:
        if self.replanning:
            return NodeLost("a node was lost, and its layers are being placed on others; try again in a moment")
        away = [node for node in self._nodes.values() if node.state not in ("up", "draining")]
        if not away:
            return None
        missing = "; ".join(f"{n.name} at {n.address}: {n.error or 'connecting'}" for n in away)
        return NodeLost(f"missing: {missing}; restart it there", away[0].name, away[0].address)

    def statuses(self, fresh: bool = False) -> list[NodeStatus]:
        for node in self._nodes.values() if fresh else ():
            node.refresh()
        return [node.status() for node in self._nodes.values()]

    def listen(self, callback: Callable[[], None]) -> None:
        """Has `callback` called, from any thread, whenever a node changes its state."""
        self._listeners.append(callback)

    def close(self) -> None:
        for node in self._nodes.values():
            node.close()

    def changed(self, node: RemoteNode) -> None:
        state = node.state
        if self._nodes.get(node.name) is not node:
            return  # one that was exchanged
        if self._states.get(node.name) != state and state != "connecting":
            self._states[node.name] = state
            self._plugins.emit(NodeEvent(node.name, state, node.address, str(node.error or "")))
        for callback in self._listeners:
            callback()


def _remote_node(spec: RunSpec, info: ModelInfo, placement: Placement, name: str, nodes: Nodes) -> RemoteNode:
    """The way to one worker, and what to assign to it should it have brought no layers."""
    stages = _stages(placement, name)
    # A master whose components are all elsewhere may have a folder without weights, which has no tensors to ask for.
    known = any(info.layer(layer).tensors for stage in stages for layer in stage)
    tensors = spec.checkpoint.tensors if known else {}
    fingerprints = {}
    for layer in (layer for stage in stages for layer in stage):
        names = info.layer(layer).tensors
        if names and all(tensor in tensors for tensor in names):
            fingerprints[layer] = spec.checkpoint.fingerprint(names)[:32]
    expectation = Expectation(info.model_type, stages, info.identity, fingerprints, spec.rejoin)
    host = spec.topology.node(name).host
    dial = _dial(spec, name, host)

    def make() -> Assignment:
        files = nodes.supply.offer(layer_files(spec.checkpoint, info, expectation.layers))
        others = tuple(node.host for node in spec.topology.nodes if node.host is not None and node.name != name)
        who = platform.node() or MASTER
        return Assignment(who, spec.checkpoint.name, info.model_type, stages, spec.options, files, others)

    def report(what: str, done: int, total: int) -> None:
        if spec.progress is not None:
            spec.progress(f"{name} {what}", done, total)

    assigner = NodeAssigner(name, make, nodes.supply, _further(spec, name, host), report, spec.timing)
    return RemoteNode(name, str(host or "joining"), dial, expectation, nodes.changed, spec.timing, assigner)


def _stages(placement: Placement, name: str) -> tuple[tuple[str, ...], ...]:
    return tuple(span.layers for span in placement.spans if name in span.nodes)


def _dial(spec: RunSpec, name: str, host: Address | None) -> Dial:
    dial, joined = spec.dial, spec.joined
    if host is not None and dial is not None:
        return lambda timeout: dial(host, timeout)
    if joined is None:
        raise ConfigError(f"node {name!r} has no host in {spec.topology.source or 'the topology'}; add host: 'address:port'")
    return lambda timeout: joined(name, timeout)


def _further(spec: RunSpec, name: str, host: Address | None) -> Further | None:
    """More channels to a worker beside the one it has: the master dials, or asks a worker that joined to dial again."""
    dial, again = spec.dial, spec.joined_again
    if host is not None and dial is not None:
        return lambda _, timeout: dial(host, timeout)
    if again is None:
        return None

    def invited(link: Link, timeout: float) -> Channel:
        try:
            return again(name, lambda ticket: link.ask(Type.JOIN, {"ticket": ticket}).result(timeout), timeout)
        except TimeoutError:
            raise NodeUnreachable(f"{name} did not dial again in {timeout:g} s", name) from None

    return invited
