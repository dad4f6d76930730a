"""What `cake bench image` does: paint the same request a few times and tell where the time went."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import click

from cake_core.cli.app import current_app
from cake_core.cli.opening import opened_image
from cake_core.cli.options import ModelFlags
from cake_core.events import ImageDone, ImageStep
from cake_core.requests import ImageRequest
from cake_core.runtime import ImageRuntime


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians over the runs. `step_seconds` is the median step after the first of each image; bytes are of tensors, a run;
    `wire_seconds` is what remote calls took beyond the computing on their nodes, a run."""

    model: str
    device: str
    dtype: str
    width: int
    height: int
    steps: int
    images: int
    step_seconds: float
    image_seconds: float
    calls: int
    bytes_sent: int
    bytes_received: int
    wire_seconds: float


@dataclass(frozen=True, slots=True)
class _Run:
    seconds: float
    steps: list[float]
    pictures: list[ImageDone]
    traffic: Any


def run(flags: ModelFlags, request: ImageRequest, runs: int, as_json: bool) -> None:
    plugins = current_app().plugins
    with opened_image(plugins, flags, flags.checkpoint(plugins)) as runtime:
        _paint(runtime, request)  # the first run compiles kernels and connects
        measured = summarise(runtime, [_paint(runtime, request) for _ in range(runs)])
    if as_json:
        click.echo(json.dumps(asdict(measured)))
        return
    for name, value in asdict(measured).items():
        click.echo(
            f"{name.replace('_', ' '):>15}  {value:.4f}"
            if isinstance(value, float)
            else f"{name.replace('_', ' '):>15}  {value}"
        )


def _paint(runtime: ImageRuntime, request: ImageRequest) -> _Run:
    started = time.perf_counter()
    events = list(runtime.engine.generate(request))
    seconds = time.perf_counter() - started
    steps = [event.seconds for event in events if isinstance(event, ImageStep) and event.step > 1]
    pictures = [event for event in events if isinstance(event, ImageDone)]
    return _Run(seconds, steps or [seconds], pictures, getattr(runtime.engine.model, "traffic", None))


def summarise(runtime: ImageRuntime, runs: list[_Run]) -> Measured:
    """The table's row. Raises nothing: what a model does not tell counts as zero."""
    picture, images = runs[0].pictures[0], len(runs[0].pictures)
    held = list(runtime.memory()) or [m for node in runtime.nodes() for m in node.memory]
    largest = max(held, key=lambda memory: memory.weights)
    traffic = runs[-1].traffic
    return Measured(
        model=runtime.info.name,
        device=largest.device,
        dtype=largest.dtype,
        width=picture.width,
        height=picture.height,
        steps=len(runs[0].steps) // images + 1,
        images=images,
        step_seconds=statistics.median(step for one in runs for step in one.steps),
        image_seconds=statistics.median(one.seconds for one in runs) / images,
        calls=traffic.calls if traffic else 0,
        bytes_sent=traffic.sent + traffic.constants if traffic else 0,
        bytes_received=traffic.received if traffic else 0,
        wire_seconds=max(0.0, traffic.seconds - traffic.computing) if traffic else 0.0,
    )
