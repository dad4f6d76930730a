"""Opens a model for a command: progress bars while it loads, the placement when it is there, everything closed at the end."""

from __future__ import annotations

import contextlib
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
    from cake_core.runtime import ImageRuntime, TextRuntime


def model_type_of(plugins: Plugins, checkpoint: Checkpoint, flags: ModelFlags) -> Literal["text", "image"]:
    """The kind of model that a checkpoint is, by the backend that serves it."""
    return plugins.backend_for(checkpoint, flags.kind).model_type


@contextlib.contextmanager
def opened_text(plugins: Plugins, flags: ModelFlags, checkpoint: Checkpoint) -> Iterator[TextRuntime]:
    """Connects, loads, says what is where; closes at the end."""
    from cake_core.runtime import open_text

    start = time.monotonic()
    with Bars("loading") as bars:
        runtime = open_text(plugins, flags.run_spec(plugins, checkpoint, loading(bars)))
    with contextlib.closing(runtime):
        announce(runtime.info, runtime.placement, time.monotonic() - start)
        yield runtime


@contextlib.contextmanager
def opened_image(plugins: Plugins, flags: ModelFlags, checkpoint: Checkpoint) -> Iterator[ImageRuntime]:
    """The same for an image model."""
    from cake_core.runtime import open_image

    start = time.monotonic()
    with Bars("loading") as bars:
        runtime = open_image(plugins, flags.run_spec(plugins, checkpoint, loading(bars)))
    with contextlib.closing(runtime):
        announce(runtime.info, runtime.placement, time.monotonic() - start)
        yield runtime


def loading(bars: Bars) -> Callable[[str, int, int], None]:
    """Progress of a load, its layers written as ranges."""
    return lambda layers, done, total: bars.update(", ".join(compress(tuple(layers.split(", ")))), done, total)


def announce(info: ModelInfo, placement: Placement, seconds: float) -> None:
    """The model and which node serves which layers, on stderr."""
    total = sum(layer.nbytes for layer in info.layers)
    note(
        f"{info.name} ({info.architecture}, {info.dtype}): {plural(len(info.layers), 'layer')}, {human_bytes(total)}, "
        f"ready in {human_seconds(seconds)}"
    )
    rows = [(node, layers, human_bytes(nbytes)) for node, layers, nbytes in placement.table(info)]
    show_table(("node", "layers", "bytes"), rows, right=(2,), err=True)
