"""From the workers that are about to a topology: who is there, what they were measured to do, and who gets which layers.

A topology file keeps full control: only its nodes without layers are filled. Without one, workers are looked for at the
addresses given, among those that joined, and on the local network.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from cake_core.cluster.chain import Way
from cake_core.cluster.discovery import Found, browse
from cake_core.cluster.survey import Surveyed, survey
from cake_core.errors import CakeError
from cake_core.links.connect import Connector
from cake_core.links.reports import read_memory
from cake_core.model import LoadOptions, ModelInfo
from cake_core.planners import Plan, PlanRequest, plan
from cake_core.planners.request import Objective
from cake_core.profiles import ClusterProfile, NodeProfile
from cake_core.spreading import KV_SHARE, spread
from cake_core.topology import MASTER, Node, Topology
from cake_core.transport import Address

log = logging.getLogger(__name__)

DIAL = 3.0
SETTLE = 1.0
"""Seconds to wait for further workers once one has joined."""
AT_ONCE = 16
CONTEXT = 4096
"""Positions of KV cache to plan for where nobody asked for another context."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Wishes:
    """`workers`: where to look, None for the local network. `joining`: wait for workers that dial, up to `wait` seconds.
    `spread`: use every worker by its memory, also where fewer would do. `plan_for`: what else the planner is to aim at.
    `route`: how batches will cross the workers."""

    workers: tuple[Address, ...] | None = None
    joining: bool = False
    wait: float = 10.0
    spread: bool = False
    plan_for: Objective = "latency"
    route: Way = "auto"


class Search:
    """Looks for workers in threads that start at once, so that other things can be done meanwhile. `backend`: whose models
    they are to measure themselves for."""

    def __init__(self, connector: Connector, wishes: Wishes, topology: Topology, backend: str = "") -> None:
        self._backend = backend
        self._connector = connector
        self._wishes = wishes
        self._topology = topology
        self._found: list[Found] = []
        self._thread: threading.Thread | None = None
        if wishes.workers is None and not topology.nodes and not wishes.joining:
            self._thread = threading.Thread(target=lambda: self._found.extend(browse()), name="cake-browse", daemon=True)
            self._thread.start()

    def everybody(self, say: Say) -> list[Surveyed]:
        """Every worker that answers; `say` is told of those that do not, with the reason."""
        targets: list[tuple[str, Sequence[Address]]] = [("", (address,)) for address in self._wishes.workers or ()]
        targets += [(node.name, (node.host,)) for node in self._topology.nodes if node.host is not None]
        if self._thread is not None:
            self._thread.join()
            targets += [(found.name, found.addresses) for found in self._found]
        joined = self._arrivals()
        if self._wishes.joining and not joined:
            say(f"nobody joined within {self._wishes.wait:g} s; start `cake worker --join` there, or wait longer (--wait)")
        targets += [(name, ()) for name in joined]
        with ThreadPoolExecutor(AT_ONCE, "cake-survey") as pool:
            found = list(pool.map(lambda target: self._attempt(target[0], target[1], say), targets))
        return [worker for worker in found if worker is not None]

    def _arrivals(self) -> list[str]:
        """Who has joined: all that are expected, or, where anybody may, whoever comes in time."""
        expected = {node.name for node in self._topology.nodes if node.host is None}
        if not self._wishes.joining:
            return []
        until = time.monotonic() + self._wishes.wait
        while time.monotonic() < until:
            arrived = set(self._connector.arrived())
            if expected and expected <= arrived:
                break
            if arrived and not expected:
                until = min(until, time.monotonic() + SETTLE)
            time.sleep(0.05)
        return sorted(expected or self._connector.arrived())

    def _attempt(self, name: str, addresses: Sequence[Address], say: Say) -> Surveyed | None:
        """Surveys a worker at the first address that answers, or, without any, one that joined."""
        try:
            if not addresses:
                return _named(survey(self._connector.joined(name, DIAL), None, backend=self._backend), name)
            worker = self._dialled(addresses)
            return _named(worker, name) if name else worker
        except CakeError as error:
            say(f"not used: {error}")
            return None

    def _dialled(self, addresses: Sequence[Address]) -> Surveyed:
        for address in addresses[:-1]:
            try:
                return survey(self._connector.dial(address, DIAL), address, backend=self._backend)
            except CakeError as error:
                log.info("%s", error)
        return survey(self._connector.dial(addresses[-1], DIAL), addresses[-1], backend=self._backend)


def _named(worker: Surveyed, name: str) -> Surveyed:
    return Surveyed(name, worker.address, worker.link, worker.report, worker.profile)


def usable(workers: Sequence[Surveyed], say: Say, topology: Topology | None = None) -> list[Surveyed]:
    """Those that were measured and either wait for layers or have them from the topology, each under a name of its own; `say`
    is told of the others."""
    nodes = {node.name: node for node in (topology or Topology()).nodes}
    chosen: list[Surveyed] = []
    for worker in sorted(workers, key=lambda worker: (worker.name not in nodes, worker.name)):
        if worker.name in nodes and nodes[worker.name].layers and worker.profile is not None:
            chosen.append(worker)
        elif not worker.bare:
            say(f"not used: {worker.name} serves layers of its own; name it in a topology file")
        elif worker.profile is None:
            say(f"not used: nothing is known of {worker.name}'s memory")
        elif worker.held_by:
            say(f"not used: {worker.name} is held by {', '.join(worker.held_by)} with {worker.model}")
        else:
            taken = {MASTER, *(other.name for other in chosen)}
            name = next(n for n in (worker.name, *(f"{worker.name}-{i}" for i in range(2, 10_000))) if n not in taken)
            chosen.append(_named(worker, name))
    return chosen


@dataclass(frozen=True, slots=True)
class Gathered:
    """The topology to run with, and why workers were left out of it; these may be spares when a node is lost. `kv_tokens`: what
    every stage must be told to provide, None where each provides enough by itself."""

    topology: Topology
    left_out: Mapping[str, str] = field(default_factory=dict)
    advice: tuple[str, ...] = ()
    spares: tuple[Node, ...] = ()
    kv_tokens: int | None = None


def gather(
    info: ModelInfo,
    topology: Topology,
    master: NodeProfile,
    workers: Sequence[Surveyed],
    wishes: Wishes,
    options: LoadOptions,
) -> Gathered:
    """Decides who serves what. Pure. Raises CapacityError where the layers do not fit."""
    if not workers:
        return Gathered(topology)
    cluster = cluster_profile(master, workers)
    memory = {node.name: node.memory_free for node in (cluster.master, *cluster.nodes)}
    positions = positions_of(info, options)
    if wishes.spread:
        shared = _shared(info, cluster, topology, positions)
        return Gathered(shared, kv_tokens=_promise(info, shared, memory, positions))
    ask = PlanRequest(context=positions, objective=wishes.plan_for, topology=topology)
    planned = plan_as_wished(info, cluster, ask, wishes)
    used = {node.name for node in planned.topology.nodes}
    spares = tuple(Node(worker.name, worker.address, ()) for worker in workers if worker.name not in used)
    promise = _promise(info, planned.topology, memory, planned.kv_tokens)
    return Gathered(planned.topology, planned.left_out, planned.advice, spares, promise)


def plan_as_wished(info: ModelInfo, cluster: ClusterProfile, ask: PlanRequest, wishes: Wishes) -> Plan:
    """The plan that a run with these wishes would follow. Pure. Raises CapacityError where the layers do not fit."""
    if not wishes.spread:
        whole = _with_everybody(ask.topology, cluster)
        return plan_for_route(info, cluster, replace(ask, topology=whole), wishes.route)
    shared = _shared(info, cluster, ask.topology, (ask.context or info.context_length) * ask.streams)
    names = {MASTER, *(node.name for node in shared.nodes)}
    links = {pair: link for pair, link in cluster.links.items() if names.issuperset(pair)}
    there = ClusterProfile(cluster.master, tuple(node for node in cluster.nodes if node.name in names), links)
    return plan_for_route(info, there, replace(ask, topology=shared), wishes.route)


def _with_everybody(topology: Topology, cluster: ClusterProfile) -> Topology:
    named = {node.name for node in topology.nodes}
    more = (Node(n.name, Address.parse(n.host) if n.host else None, ()) for n in cluster.nodes if n.name not in named)
    return Topology((*topology.nodes, *more), topology.source)


def _shared(info: ModelInfo, cluster: ClusterProfile, topology: Topology, positions: int) -> Topology:
    """The layers that the topology leaves open, shared out by memory among the master and the nodes without layers."""
    given = {node.name for node in topology.nodes if node.layers}
    memory = {node.name: node.memory_free for node in (cluster.master, *cluster.nodes) if node.name not in given}
    return spread(info, _with_everybody(topology, cluster), memory, positions)


def positions_of(info: ModelInfo, options: LoadOptions) -> int:
    """Positions of KV cache to plan for."""
    return options.kv_tokens or options.context or min(info.context_length, CONTEXT)


def plan_for_route(info: ModelInfo, cluster: ClusterProfile, ask: PlanRequest, route: Way) -> Plan:
    """Plans for the way that batches will really go: a worker hands over only to one with an address."""
    if route != "star":
        planned = plan(info, cluster, replace(ask, chain=True))
        if route == "chain" or all(node.host is not None for node in planned.topology.nodes):
            return planned
    return plan(info, cluster, ask)


def _promise(info: ModelInfo, topology: Topology, memory: Mapping[str, int], positions: int) -> int | None:
    """`positions` where the share of memory that a stage takes by itself might hold fewer; elsewhere it may take more."""
    listed = {layer: node.name for node in topology.nodes for layer in node.layers}
    left, needed = dict(memory), dict.fromkeys(memory, 0)
    for layer in info.layers:
        name = listed.get(layer.name, MASTER)
        if name in left:  # of a node that a file gives its layers nothing is known
            left[name] -= layer.nbytes
            needed[name] += layer.kv_bytes_per_token * positions
    return positions if any(needed[name] and needed[name] > KV_SHARE * left[name] for name in left) else None


def cluster_profile(master: NodeProfile, workers: Sequence[Surveyed]) -> ClusterProfile:
    """What was measured, put together for the planner."""
    profiles = tuple(
        replace(_emptied(worker.profile, worker.report), name=worker.name, host=str(worker.address or ""))
        for worker in workers
        if worker.profile is not None
    )
    return ClusterProfile(master, profiles, {(MASTER, worker.name): worker.link for worker in workers})


def _emptied(profile: NodeProfile, report: Mapping[str, Any]) -> NodeProfile:
    """With the memory that is free once what the worker has loaded makes room: it serves exactly that, or something else
    instead. A KV cache on a CPU is not counted: the system commits its memory as it is written, and what was never written is
    free already."""
    loaded = [read_memory(fields) for fields in report.get("memory", ())]
    taken = {memory.device: 0 for memory in loaded}
    for memory in loaded:
        cache = 0 if memory.device.startswith("cpu") else memory.kv_tokens * memory.kv_bytes_per_token
        taken[memory.device] += memory.weights + cache
    devices = (replace(d, memory_free=d.memory_free + taken.get(d.device, 0)) for d in profile.devices)
    return replace(profile, devices=tuple(devices))
