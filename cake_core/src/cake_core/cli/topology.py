"""`cake topology check|plan|show`: what a topology file means for a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cake_core.cli.app import current_app
from cake_core.cli.console import human_bytes, note, plural, show_json, show_table
from cake_core.cli.option_groups import ROUTES
from cake_core.cli.options import ModelFlags, model_options
from cake_core.cli.sections import SectionedCommand, option
from cake_core.errors import ConfigError

if TYPE_CHECKING:
    from cake_core.model import ModelInfo
    from cake_core.placement import Placement
    from cake_core.topology import Topology


@click.group()
def topology() -> None:
    """Check, plan or show which node serves which layers."""


@topology.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", default=None, help="Fit it to this model too; without one only the file's form is checked.")
@click.option("--model-type", default=None, help="text or image.")
def check(file: Path, model: str | None, model_type: str | None) -> None:
    """Validate a topology file, and its fit to a model."""
    from cake_core.topology import load_topology

    nodes = load_topology(file)
    layers = sum(len(node.layers) for node in nodes.nodes)
    if model is None and model_type is None:
        click.echo(
            f"{file}: ok, {plural(len(nodes.nodes), 'node')} with {plural(layers, 'layer')} (give --model to check the fit)"
        )
        return
    info, placement = _fit(ModelFlags(model=model, model_type=model_type), nodes)
    on_master = len(placement.layers_of("master"))
    click.echo(
        f"{file}: ok for {info.name}, {plural(len(nodes.nodes), 'node')} with {layers} of {plural(len(info.layers), 'layer')}, "
        f"{on_master} on the master"
    )


PLAN = "Plan"


@topology.command(cls=SectionedCommand)
@option(PLAN, "--workers", default="none", show_default=True, metavar="auto|none|H:P,...", help="Plan for workers found there.")
@option(PLAN, "--profiles", type=click.Path(path_type=Path), metavar="FILE", help="Plan for the machines in a JSON file.")
@option(PLAN, "--plan-for", type=click.Choice(["latency", "throughput"]), default="latency", show_default=True, help="The aim.")
@option(PLAN, "--route", type=click.Choice(ROUTES), default="auto", show_default=True, help="How batches will go.")
@option(PLAN, "--spread", is_flag=True, help="Share the model among all workers, by their memory.")
@option(PLAN, "--listen", metavar="H:P", help="Also plan for workers that --join here.")
@option(PLAN, "--wait", type=float, default=10, metavar="S", show_default=True, help="Seconds to wait for those.")
@option(PLAN, "--streams", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Sequences at once.")
@option(PLAN, "--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, metavar="N", help="To predict for.")
@option(PLAN, "--write", type=click.Path(path_type=Path), metavar="FILE", help="Write the plan as a topology file.")
@option(PLAN, "--json", "as_json", is_flag=True, help="Print JSON.")
@model_options("model", "topology", "load", "key")
def plan(flags: ModelFlags, as_json: bool, profiles: Path | None, streams: int, prompt_tokens: int, write: Path | None) -> None:
    """Show what each node would hold and take, in order of execution.

    With --workers, --listen or --profiles it is planned as `cake run` does who should hold what, and predicted what that will
    bring; nodes to which --topology gives layers keep them. Else the topology is shown as it is.
    """
    if profiles is not None or flags.workers != "none" or flags.listen is not None:
        from cake_core.cli.plan import make_plan, show_plan, write_topology

        info, made = make_plan(flags, profiles, streams, prompt_tokens)
        show_plan(info, made, as_json)
        if write is not None:
            write_topology(made, write)
        return
    if write is not None:
        raise ConfigError("--write needs a plan: give --workers, --listen or --profiles")
    info, placement = _fit(flags, flags.load_topology())
    if as_json:
        show_json(_as_json(info, placement))
        return
    rows = placement_rows(info, placement)
    show_table(("node", "layers", "bytes", f"KV at {info.context_length}"), rows, right=(2, 3))
    total = sum(layer.nbytes for layer in info.layers)
    note(f"{info.name} ({info.architecture}, {info.dtype}): {plural(len(info.layers), 'layer')}, {human_bytes(total)}")


@topology.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(file: Path, as_json: bool) -> None:
    """Show the nodes of a topology file."""
    from cake_core.topology import compress, load_topology

    nodes = load_topology(file).nodes
    if as_json:
        show_json(
            [
                {
                    "name": node.name,
                    "host": None if node.host is None else str(node.host),
                    "description": node.description,
                    "layers": list(node.layers),
                }
                for node in nodes
            ]
        )
        return
    rows = [(n.name, str(n.host or "joins"), ", ".join(compress(n.layers)) or "-", n.description or "-") for n in nodes]
    show_table(("node", "host", "layers", "description"), rows)


def _fit(flags: ModelFlags, nodes: Topology) -> tuple[ModelInfo, Placement]:
    plugins = current_app().plugins
    checkpoint = flags.checkpoint(plugins)
    backend = plugins.backend_for(checkpoint, flags.kind)
    info = backend.describe(checkpoint, flags.load_options())
    return info, plugins.plan(info, nodes)


def placement_rows(info: ModelInfo, placement: Placement) -> Sequence[tuple[str, str, str, str]]:
    """Node, layers, bytes of weights and of KV cache for one sequence of the whole context, a row a span."""
    rows = []
    for span, (node, layers, nbytes) in zip(_spans(placement), placement.table(info), strict=True):
        kv = sum(info.layer(name).kv_bytes_per_token for name in span) * info.context_length
        rows.append((node, layers, human_bytes(nbytes), human_bytes(kv) if kv else "-"))
    return rows


def _spans(placement: Placement) -> list[tuple[str, ...]]:
    return [span.layers for span in placement.spans for _ in span.nodes]


def _as_json(info: ModelInfo, placement: Placement) -> dict[str, Any]:
    sizes = {layer.name: layer for layer in info.layers}
    return {
        "model": info.name,
        "architecture": info.architecture,
        "model_type": info.model_type,
        "dtype": info.dtype,
        "context": info.context_length,
        "layers": len(info.layers),
        "bytes": sum(layer.nbytes for layer in info.layers),
        "spans": [
            {
                "nodes": list(span.nodes),
                "layers": list(span.layers),
                "bytes": sum(sizes[name].nbytes for name in span.layers),
                "kv_bytes_per_token": sum(sizes[name].kv_bytes_per_token for name in span.layers),
            }
            for span in placement.spans
        ],
    }
