"""Paints docs/emoji-grid.png: a dozen prompts to the embedded model, its unet on one worker, clip and vae on another.

python tools/emoji_grid.py [docs/emoji-grid.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

from cake_core import png
from cake_core.events import ImageDone
from cake_core.plugins import Plugins
from cake_core.requests import ImageRequest
from cake_core.testing.cluster import LocalCluster

PROMPTS = (
    "a red apple", "a slice of pizza", "a rocket", "a birthday cake", "a cat face", "a sunflower",
    "an octopus", "a snowman", "a guitar", "a mushroom", "a whale", "hot beverage",
)  # fmt: skip
COLUMNS = 6
SEED = 1


def paint() -> list[ImageDone]:
    """One picture a prompt, over TCP."""
    plugins = Plugins()
    layers = {"painter": ["unet"], "studio": ["clip", "vae"]}
    with LocalCluster(plugins, plugins.resolve("emoji"), plugins.transport("tcp"), layers) as cluster:
        engine = cluster.open_image().engine
        events = [event for prompt in PROMPTS for event in engine.generate(ImageRequest(prompt, seed=SEED))]
    return [event for event in events if isinstance(event, ImageDone)]


def grid(pictures: list[ImageDone]) -> bytes:
    """The pictures, all of one size, in rows of COLUMNS, as a PNG file."""
    width, height = pictures[0].width, pictures[0].height
    rows = []
    for first in range(0, len(pictures), COLUMNS):
        for y in range(height):
            line = slice(3 * width * y, 3 * width * (y + 1))
            rows.append(b"".join(bytes(picture.rgb[line]) for picture in pictures[first : first + COLUMNS]))
    return png.encode(b"".join(rows), width * COLUMNS, height * len(pictures) // COLUMNS)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/emoji-grid.png")
    target.write_bytes(grid(paint()))
