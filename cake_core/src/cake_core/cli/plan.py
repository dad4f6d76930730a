"""`cake topology plan`: who should serve what, by what machines and links were measured to do, and what that will bring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cake_core.cli.app import current_app
from cake_core.cli.console import human_bytes, note, show_json, show_table
from cake_core.cli.gather import all_wishes
from cake_core.cli.options import ModelFlags
from cake_core.errors import ConfigError

if TYPE_CHECKING:
    from cake_core.cluster.gathering import Wishes
    from cake_core.model import Backend, ModelInfo
    from cake_core.planners import Plan
    from cake_core.profiles import ClusterProfile
    from cake_core.topology import Topology


def make_plan(flags: ModelFlags, profiles: Path | None, streams: int, prompt: int) -> tuple[ModelInfo, Plan]:
    """Plans as `cake run` would, for the profiles of a file, or for this machine and the workers that are found."""
    from cake_core.cluster.gathering import plan_as_wished, positions_of
    from cake_core.planners import PlanRequest

    plugins = current_app().plugins
    checkpoint, options, topology = flags.checkpoint(plugins), flags.load_options(), flags.load_topology()
    backend = plugins.backend_for(checkpoint, flags.kind)
    info = backend.describe(checkpoint, options)
    wishes = all_wishes(flags, topology)
    cluster = read_profiles(profiles) if profiles is not None else _measured(flags, backend, topology, wishes)
    ask = PlanRequest(
        context=positions_of(info, options),
        streams=streams,
        objective=flags.plan_for,
        topology=topology,
        prompt=prompt,
    )
    return info, plan_as_wished(info, cluster, ask, wishes)


def read_profiles(path: Path) -> ClusterProfile:
    """Raises ConfigError naming what is wrong in the file."""
    from cake_core.profiles import ClusterProfile

    try:
        fields = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the profiles {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    return ClusterProfile.from_fields(fields, str(path))


def _measured(flags: ModelFlags, backend: Backend, topology: Topology, wishes: Wishes) -> ClusterProfile:
    from cake_core.cli.machine import prober
    from cake_core.cluster.gathering import Search, cluster_profile, usable
    from cake_core.topology import MASTER

    plugins = current_app().plugins
    connector = flags.connector(plugins, topology)
    try:
        found = Search(connector, wishes, topology, backend.name).everybody(note)
    finally:
        connector.close()
    own = prober(plugins, flags.load_options()).node(MASTER, backend.name)
    return cluster_profile(own, usable(found, note, topology))


def show_plan(info: ModelInfo, plan: Plan, as_json: bool) -> None:
    """The plan as a table and sentences, or as JSON."""
    if as_json:
        show_json({"model": info.name, **plan.as_fields()})
        return
    from cake_core.topology import compress

    rows = [
        (
            stage.node,
            stage.device,
            ", ".join(compress(stage.layers)),
            f"{human_bytes(stage.weights + stage.kv)} of {human_bytes(stage.room)}",
            f"{stage.seconds * 1e3:.2f} ms",
        )
        for stage in plan.stages
    ]
    show_table(("node", "device", "layers", "memory", "step" if info.model_type == "text" else "call"), rows, right=(3, 4))
    if info.model_type == "text":
        each, first = plan.prediction.seconds_per_token, plan.prediction.seconds_to_first
        click.echo(f"one sequence: {each * 1e3:.2f} ms a token, {1 / each:.1f} tokens/s")
        click.echo(f"every stage busy: {plan.prediction.tokens_per_second:.1f} tokens/s")
        click.echo(f"first token: {'unknown' if first is None else f'{first:.2f} s'}")
    for name, why in plan.left_out.items():
        click.echo(f"left out: {name} {why}")
    for line in plan.advice:
        click.echo(line)


def write_topology(plan: Plan, path: Path) -> None:
    """The plan as a topology file. Raises ConfigError where that cannot be written."""
    from cake_core.split import topology_text

    try:
        path.write_text(topology_text(plan.topology.nodes), "utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    note(f"{path} written")
