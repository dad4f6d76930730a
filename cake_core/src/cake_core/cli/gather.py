"""Looks for workers that wait for layers, says what it found, and makes the topology that the command runs with."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from cake_core.cli.console import human_bytes, note
from cake_core.errors import ConfigError

if TYPE_CHECKING:
    from cake_core.checkpoint import Checkpoint
    from cake_core.cli.options import ModelFlags
    from cake_core.cluster.chain import Way
    from cake_core.cluster.gathering import Gathered, Wishes
    from cake_core.cluster.survey import Surveyed
    from cake_core.links.connect import Connector
    from cake_core.plugins import Plugins
    from cake_core.topology import Topology
    from cake_core.transport import Address


def gathered_topology(
    plugins: Plugins, flags: ModelFlags, checkpoint: Checkpoint, connector: Connector, topology: Topology
) -> Gathered:
    """The topology with every node filled, or, where there is no file, with the workers that were found."""
    from cake_core.cluster.gathering import Gathered

    wishes = wishes_of(flags, topology)
    if wishes is None:
        return Gathered(topology)
    from cake_core.cli.machine import prober
    from cake_core.cluster.gathering import Search, gather, usable
    from cake_core.topology import MASTER

    backend, options = plugins.backend_for(checkpoint, flags.kind), flags.load_options()
    search = Search(connector, wishes, topology, backend.name)
    info = backend.describe(checkpoint, options)
    workers = usable(search.everybody(note), note, topology)
    if not workers:
        return Gathered(topology)
    for worker in workers:
        note(f"found {describe(worker)}")
    gathered = gather(info, topology, prober(plugins, options).node(MASTER, backend.name), workers, wishes, options)
    for name, why in gathered.left_out.items():
        note(f"{name} is not used: {why}")
    for line in gathered.advice:
        note(line)
    return gathered


def wishes_of(flags: ModelFlags, topology: Topology) -> Wishes | None:
    """What to look for; None where a topology file says everything, or nobody is wanted. Raises ConfigError."""
    to_fill = [node for node in topology.nodes if not node.layers]
    if topology.nodes and not to_fill:
        return None
    if flags.workers == "none" and not topology.nodes and flags.listen is None:
        return None
    return all_wishes(flags, topology)


def all_wishes(flags: ModelFlags, topology: Topology) -> Wishes:
    """What the options say of workers. Raises ConfigError."""
    from cake_core.cluster.gathering import Wishes

    joining = flags.listen is not None and (not topology.nodes or any(node.host is None for node in topology.nodes))
    return Wishes(addresses(flags.workers), joining, flags.wait, flags.spread, flags.plan_for, cast("Way", flags.route))


def addresses(workers: str) -> tuple[Address, ...] | None:
    """What --workers names; None for the local network."""
    from cake_core.transport import Address

    if workers == "auto":
        return None
    if workers == "none":
        return ()
    found = tuple(Address.parse(part) for part in workers.split(",") if part.strip())
    if not found:
        raise ConfigError("--workers is auto, none, or addresses HOST:PORT,HOST:PORT")
    return found


def describe(worker: Surveyed) -> str:
    """A worker in a line: name, address, free memory of its devices, the way to it."""
    where = "joined" if worker.address is None else str(worker.address).removeprefix("tcp://")
    devices = worker.profile.devices if worker.profile is not None else ()
    memory = ", ".join(f"{device.device} {human_bytes(device.memory_free)} free" for device in devices)
    return f"{worker.name} ({where}): {memory}; {1000 * worker.link.round_trip:.1f} ms, {human_bytes(int(worker.link.rate))}/s"
