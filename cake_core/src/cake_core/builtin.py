"""Core's own defaults, as hook implementations like any other: tried last."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from cake_core.hookspecs import hookimpl

if TYPE_CHECKING:
    import click

    from cake_core.checkpoint import Checkpoint
    from cake_core.model import Backend, ModelInfo
    from cake_core.placement import Placement
    from cake_core.topology import Topology


@hookimpl
def cake_register_backends() -> Iterable[Backend]:
    from cake_core.testing.toys import ToyImageBackend, ToyTextBackend

    return (ToyTextBackend(), ToyImageBackend())


@hookimpl
def cake_register_commands(cli: click.Group) -> None:
    from cake_core.cli.bench import bench_group, bench_text

    bench_group(cli).add_command(bench_text)


@hookimpl(trylast=True)
def cake_resolve_checkpoint(reference: str) -> Checkpoint | None:
    from cake_core.resolve import resolve

    return resolve(reference)


@hookimpl(trylast=True)
def cake_plan_placement(model: ModelInfo, topology: Topology) -> Placement | None:
    from cake_core.placement import place

    return place(model, topology)
