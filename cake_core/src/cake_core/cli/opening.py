"""Opens a model for a command: progress bars while it loads, the placement when it is there, everything closed at the end."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from cake_core.cli.console import Bars, human_bytes, human_seconds, note, plural, show_table
from cake_core.topology import compress

if TYPE_CHECKING:
    from cake_core.checkpoint import Checkpoint
    from cake_core.cli.options import ModelFlags
    from cake_core.model import ModelInfo
    from cake_core.placement import Placement
    from cake_core.plugins import Plugins
    from cake_core.runtime import ImageRuntime, RunSpec, TextRuntime


def model_type_of(plugins: Plugins, checkpoint: Checkpoint, flags: ModelFlags) -> Literal["text", "image"]:
    """The kind of model that a checkpoint is, by the backend that serves it."""
    return plugins.backend_for(checkpoint, flags.kind).model_type


def take_short_turns() -> None:
    """Threads of this process hand the interpreter on after half a millisecond: with Python's five, a token that has just
    arrived waits as long for whoever computes or counts meanwhile."""
    sys.setswitchinterval(5e-4)


@contextlib.contextmanager
def opened_text(plugins: Plugins, flags: ModelFlags, checkpoint: Checkpoint) -> Iterator[TextRuntime]:
    """Says what goes where, connects, loads; closes at the end."""
    from cake_core.runtime import open_text

    with _opening(plugins, flags, checkpoint, "text") as spec:
        runtime = open_text(plugins, spec)
    with contextlib.closing(runtime):
        yield runtime


@contextlib.contextmanager
def opened_image(plugins: Plugins, flags: ModelFlags, checkpoint: Checkpoint) -> Iterator[ImageRuntime]:
    """The same for an image model."""
    from cake_core.runtime import open_image

    with _opening(plugins, flags, checkpoint, "image") as spec:
        runtime = open_image(plugins, spec)
    with contextlib.closing(runtime):
        yield runtime


@contextlib.contextmanager
def _opening(
    plugins: Plugins, flags: ModelFlags, checkpoint: Checkpoint, kind: Literal["text", "image"]
) -> Iterator[RunSpec]:  # fmt: skip
    take_short_turns()
    start = time.monotonic()
    with Bars("loading") as bars:
        spec = flags.run_spec(plugins, checkpoint, loading(bars))
        info = plugins.backend_for(checkpoint, kind).describe(checkpoint, spec.options)
        announce(info, plugins.plan(info, spec.topology))
        yield spec
    note(f"ready in {human_seconds(time.monotonic() - start)}")


def loading(bars: Bars) -> Callable[[str, int, int], None]:
    """Progress of a load, its layers written as ranges."""
    return lambda layers, done, total: bars.update(", ".join(compress(tuple(layers.split(", ")))), done, total)


def announce(info: ModelInfo, placement: Placement, seconds: float | None = None) -> None:
    """The model and which node serves which layers, on stderr; with how long that took, when it is there already."""
    total = sum(layer.nbytes for layer in info.layers)
    note(f"{info.name} ({info.architecture}, {info.dtype}): {plural(len(info.layers), 'layer')}, {human_bytes(total)}")
    rows = [(node, layers, human_bytes(nbytes)) for node, layers, nbytes in placement.table(info)]
    show_table(("node", "layers", "bytes"), rows, right=(2,), err=True)
    if seconds is not None:
        note(f"ready in {human_seconds(seconds)}")
