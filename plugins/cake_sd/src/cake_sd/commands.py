"""`cake bench image`. Imported when the command line starts, so everything heavy waits for the call."""

from __future__ import annotations

from typing import Any

import click

from cake_core.cli.bench import bench_group
from cake_core.cli.options import ModelFlags, model_options
from cake_core.cli.sections import SectionedCommand, option

BENCH = "Bench"


def add_commands(cli: click.Group) -> None:
    bench_group(cli).add_command(bench_image)


@click.command("image", cls=SectionedCommand)
@option(BENCH, "--random-weights", metavar="V", help="A model of real size made up on the spot: v1-5, v2-1, xl, turbo.")
@option(BENCH, "--steps", type=int, metavar="N", help="Denoising steps.")
@option(BENCH, "--width", type=int, metavar="N", help="Width, a multiple of 8.")
@option(BENCH, "--height", type=int, metavar="N", help="Height, a multiple of 8.")
@option(BENCH, "--guidance", type=float, metavar="X", help="Guidance scale.")
@option(BENCH, "--n", "images", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Images a run.")
@option(
    BENCH,
    "--runs",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    metavar="N",
    help="Runs measured, after one that is not.",
)
@option(BENCH, "--compile", "compiled", is_flag=True, help="Compile the denoiser of this process.")
@option(BENCH, "--json", "as_json", is_flag=True, help="Print one JSON object.")
@model_options("model", "topology", "load", "key", "cluster", "image")
def bench_image(
    flags: ModelFlags, random_weights: str | None, runs: int, compiled: bool, as_json: bool, **job: Any
) -> None:  # fmt: skip
    """Measure an image model: seconds a step and an image, bytes and time on the wire."""
    from dataclasses import replace

    from cake_core.requests import ImageRequest
    from cake_sd.bench import run
    from cake_sd.versions import RANDOM

    flags = replace(flags, model_type="image", sd={**flags.sd, **({"compile": True} if compiled else {})})
    if random_weights is not None:
        flags = replace(flags, model=RANDOM + random_weights)
    run(flags, ImageRequest("a cake with candles", seed=1, **job), runs, as_json)
