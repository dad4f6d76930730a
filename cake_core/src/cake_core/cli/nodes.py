"""`cake nodes`: the machines that are about, and what each could do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cake_core.cli.app import current_app
from cake_core.cli.console import human_bytes, note, show_json, show_table
from cake_core.cli.options import ModelFlags, model_options
from cake_core.cli.sections import SectionedCommand, option

if TYPE_CHECKING:
    from cake_core.cluster.survey import Surveyed
    from cake_core.profiles import NodeProfile


@click.command(cls=SectionedCommand)
@option("Output", "--json", "as_json", is_flag=True, help="Print JSON.")
@option("Cluster", "--listen", metavar="H:P", help="Also wait here for workers that --join.")
@option("Cluster", "--workers", default="auto", show_default=True, metavar="auto|none|H:P,...", help="Where to look.")
@option("Cluster", "--wait", type=float, default=3, show_default=True, metavar="S", help="Seconds to wait for those that join.")
@model_options("key")
def nodes(flags: ModelFlags, as_json: bool) -> None:
    """List this machine and the workers that are found or join: devices, memory, speeds, links, what they do now."""
    from cake_core.cli.gather import addresses
    from cake_core.cli.machine import prober
    from cake_core.cluster.gathering import Search, Wishes
    from cake_core.topology import MASTER, Topology

    plugins, empty = current_app().plugins, Topology()
    connector, where, joining = flags.connector(plugins, empty), addresses(flags.workers), flags.listen is not None
    found = Search(connector, Wishes(where, joining, flags.wait), empty).everybody(note)
    if where is None and joining:
        found += Search(connector, Wishes(), empty).everybody(note)
    connector.close()
    own = prober(plugins, flags.load_options()).node(MASTER)
    if as_json:
        show_json([{"name": MASTER, "state": "this machine", "devices": own.as_fields()["devices"]}, *map(_fields, found)])
        return
    rows = [(MASTER, "-", *_devices(own), "-", "-", "this machine")]
    rows += [
        (
            worker.name,
            _where(worker),
            *_devices(worker.profile),
            f"{1000 * worker.link.round_trip:.1f} ms",
            f"{human_bytes(worker.link.rate)}/s",
            state(worker),
        )
        for worker in found
    ]
    show_table(("node", "address", "devices", "free", "reads", "round trip", "link", "state"), rows, right=(3, 4, 5, 6))
    if not found:
        note("no worker answers; start `cake worker` on another machine (and see `cake doctor` there)")


def state(worker: Surveyed) -> str:
    """What a worker does now, in words."""
    if not worker.bare:
        return f"serves its own layers of {worker.model}"
    if worker.held_by:
        return f"held by {', '.join(worker.held_by)} with {worker.model}"
    return f"free, has {worker.model} loaded" if worker.model else "free"


def _where(worker: Surveyed) -> str:
    return "joined" if worker.address is None else str(worker.address).removeprefix("tcp://")


def _devices(profile: NodeProfile | None) -> tuple[str, str, str]:
    devices = profile.devices if profile is not None else ()
    return (
        ", ".join(f"{d.device} ({d.model})" if d.model else d.device for d in devices) or "not measured",
        ", ".join(human_bytes(d.memory_free) for d in devices) or "-",
        ", ".join(f"{human_bytes(d.bandwidth)}/s" for d in devices) or "-",
    )


def _fields(worker: Surveyed) -> dict[str, Any]:
    profile = worker.profile
    return {
        "name": worker.name,
        "address": None if worker.address is None else str(worker.address),
        "state": state(worker),
        "model": worker.model,
        "held_by": list(worker.held_by),
        "link": worker.link.as_fields(),
        "devices": [] if profile is None else profile.as_fields()["devices"],
        "platform": dict(worker.report.get("platform", {})),
    }
