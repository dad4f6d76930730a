"""Paints images to files, with progress and a picture in terminals that can show one."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cake_core import png
from cake_core.cli import picture
from cake_core.cli.console import human_seconds, note, plural
from cake_core.cli.opening import opened_image
from cake_core.errors import ConfigError
from cake_core.events import ImageDone, ImageEvent, ImagePreview, ImageStep, ImageWarning

if TYPE_CHECKING:
    from cake_core.checkpoint import Checkpoint
    from cake_core.cli.image_options import ImageFlags
    from cake_core.cli.options import ModelFlags
    from cake_core.plugins import Plugins


@dataclass(frozen=True, slots=True)
class Job:
    """What to paint; a seed of None is drawn."""

    prompt: str
    seed: int | None = None

    def chosen_seed(self) -> int:
        return secrets.randbits(32) if self.seed is None else self.seed


def paint(plugins: Plugins, flags: ModelFlags, checkpoint: Checkpoint, painting: ImageFlags, job: Job) -> None:
    """Opens the model, paints the images and writes them as PNG."""
    seed = job.chosen_seed()
    sink = Studio(Files(painting, seed))
    request = painting.request(job.prompt, seed, live=sink.shows_previews)
    sink.files.check()
    with opened_image(plugins, flags, checkpoint) as runtime:
        note(f"seed {seed}")
        start = time.monotonic()
        try:
            for event in runtime.engine.generate(request):
                sink.take(event)
        finally:
            sink.clear()
        note(f"{plural(request.images, 'image')} in {human_seconds(time.monotonic() - start)}")


class Files:
    """Names and writes the pictures of one job."""

    def __init__(self, painting: ImageFlags, seed: int) -> None:
        self._output = painting.output or Path(f"cake-{seed}.png")
        self._several = painting.images * painting.batch > 1
        self._every_step = painting.preview_every > 0
        self.to_stdout = str(self._output) == "-"

    def check(self) -> None:
        """Raises ConfigError before minutes of painting are lost to a folder that is not there."""
        if self.to_stdout and self._several:
            raise ConfigError("-o - takes one image; name a file for several")
        if not self.to_stdout and not self._output.parent.is_dir():
            raise ConfigError(f"there is no folder {self._output.parent} to write {self._output.name} to; make it first")
        if self._output.is_dir():
            raise ConfigError(f"{self._output} is a folder; name a file, e.g. -o {self._output / 'picture.png'}")

    def final(self, image: int) -> Path:
        return self._output.with_stem(f"{self._output.stem}-{image + 1}") if self._several else self._output

    def step(self, image: int, step: int) -> Path | None:
        """Where to keep the picture after a step, None when they were not asked for."""
        path = self.final(image)
        return path.with_stem(f"{path.stem}-step{step}") if self._every_step and not self.to_stdout else None

    def write(self, path: Path, png: bytes) -> None:
        if self.to_stdout:
            sys.stdout.buffer.write(png)
            sys.stdout.flush()
            return
        try:
            path.write_bytes(png)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error
        note(f"wrote {path}")


class Studio:
    """Takes the events of an image job: shows how far it is, keeps what was asked for, and shows the picture."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self._live = sys.stderr.isatty()
        self._terminal = picture.detect(os.environ, self._live)
        self.shows_previews = self._terminal != "none"
        self._screen = shutil.get_terminal_size()
        self._line = 0
        self._height = 0

    def take(self, event: ImageEvent) -> None:
        if isinstance(event, ImageStep):
            self._progress(event)
        elif isinstance(event, ImagePreview):
            self._preview(event)
        elif isinstance(event, ImageWarning):
            self.clear()
            note(f"warning: {event.message}")
        elif isinstance(event, ImageDone):
            self._finish(event)

    def _progress(self, event: ImageStep) -> None:
        if not self._live:
            return
        bar = "#" * round(24 * event.step / event.steps)
        left = human_seconds((event.steps - event.step) * event.seconds)
        line = f"image {event.image + 1} [{bar:<24}] step {event.step}/{event.steps}, {event.seconds:.2f} s/step, {left} left"
        self._clear_line()
        click.echo(line, err=True, nl=False)
        self._line = len(line)

    def _preview(self, event: ImagePreview) -> None:
        path = self.files.step(event.image, event.step)
        if path is not None:
            self.clear()
            self.files.write(path, event.png)
        if self.shows_previews:
            width, height, rgb = png.decode(event.png)
            self.clear()
            # Half blocks, whatever the terminal can do: only they can be drawn over.
            columns = self._columns(width, height)
            click.echo(picture.render(rgb, width, height, columns), err=True, nl=False)
            self._height = picture.lines(width, height, columns)

    def _finish(self, event: ImageDone) -> None:
        self.clear()
        text = {"Software": "Cake", "Seed": str(event.seed)}
        columns = self._columns(event.width, event.height)
        shown = picture.render(event.rgb, event.width, event.height, columns, self._terminal)
        click.echo(shown, err=True, nl=False)
        self.files.write(self.files.final(event.image), png.encode(event.rgb, event.width, event.height, text))

    def _columns(self, width: int, height: int) -> int:
        """As wide as fits the screen with room for a few lines below: what has scrolled away cannot be drawn over."""
        fitting = 2 * (self._screen.lines - 4) * width // height
        return max(4, min(64, self._screen.columns - 1, fitting))

    def _clear_line(self) -> None:
        if self._line:
            click.echo("\r" + " " * self._line + "\r", err=True, nl=False)
            self._line = 0

    def clear(self) -> None:
        """Takes the progress line and the last preview off the screen."""
        self._clear_line()
        if self._height:
            click.echo(f"\x1b[{self._height}A\x1b[J", err=True, nl=False)
            self._height = 0
