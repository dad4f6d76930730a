"""`cake bench image`. Imported when the command line starts, so everything heavy waits for the call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cake_core.cli.options import ModelFlags, model_options
from cake_core.cli.sections import SectionedCommand, option

if TYPE_CHECKING:
    from cake_core.requests import ImageRequest

BENCH = "Bench"


def add_commands(cli: click.Group) -> None:
    """Adds `image` to the group `bench`, which whichever plugin comes first makes."""
    group = cli.commands.get("bench")
    if not isinstance(group, click.Group):
        group = click.Group("bench", help="Measure a server, a model or a cluster.")
        cli.add_command(group)
    group.add_command(bench_image)


@click.command("image", cls=SectionedCommand)
@option(BENCH, "--random-weights", metavar="V", help="A model of real size made up on the spot: v1-5, v2-1, xl, turbo.")
@option(BENCH, "--steps", type=int, metavar="N", help="Denoising steps.")
@option(BENCH, "--width", type=int, metavar="N", help="Width, a multiple of 8.")
@option(BENCH, "--height", type=int, metavar="N", help="Height, a multiple of 8.")
@option(BENCH, "--guidance", type=float, metavar="X", help="Guidance scale.")
@option(BENCH, "--n", "images", type=int, default=1, show_default=True, metavar="N", help="Images a run.")
@option(BENCH, "--runs", type=int, default=3, show_default=True, metavar="N", help="Runs measured, after one that is not.")
@option(BENCH, "--compile", "compiled", is_flag=True, help="Compile the denoiser of this process.")
@option(BENCH, "--json", "as_json", is_flag=True, help="Print one JSON object.")
@model_options("model", "topology", "load", "key", "cluster", "image")
def bench_image(
    random_weights: str | None,
    steps: int | None,
    width: int | None,
    height: int | None,
    guidance: float | None,
    images: int,
    runs: int,
    compiled: bool,
    as_json: bool,
    flags: ModelFlags,
) -> None:
    """Measure an image model: seconds a step and an image, bytes and time on the wire."""
    from dataclasses import replace

    from cake_core.requests import ImageRequest
    from cake_sd.bench import run
    from cake_sd.versions import RANDOM

    flags = replace(flags, model_type="image", sd={**flags.sd, **({"compile": True} if compiled else {})})
    if random_weights is not None:
        flags = replace(flags, model=RANDOM + random_weights)
    request: ImageRequest = ImageRequest(
        "a cake with candles", width=width, height=height, steps=steps, guidance=guidance, images=images, seed=1
    )
    run(flags, request, max(1, runs), as_json)
