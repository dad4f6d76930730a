"""The model that comes along: found by its name, offline, and what it paints is what its prompt says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cake_core.events import ImageDone, ImageStep
from cake_core.plugins import Plugins
from cake_core.requests import ImageRequest

EMOJI = Path(__file__).parents[2] / "plugins/cake_emoji/src/cake_emoji/model"

COLOURS = {
    "a red apple": (255, 60, 40),
    "green heart": (100, 180, 50),
    "a blue heart": (60, 120, 230),
    "a yellow heart": (250, 210, 50),
}


def test_the_name_is_resolved_and_nothing_else() -> None:
    from cake_emoji import hooks

    assert hooks.cake_resolve_checkpoint("") is None
    assert hooks.cake_resolve_checkpoint("emojis") is None
    plugins = Plugins(entries=())
    plugins.register("emoji", hooks)
    found = plugins.resolve("emoji")
    assert (found.name, found.path.resolve()) == ("emoji", EMOJI)


def test_the_attribution_goes_with_the_weights() -> None:
    text = (EMOJI / "ATTRIBUTION.md").read_text()
    for word in ("Noto Emoji", "Apache License 2.0", "emoji-datasource-google", "MIT License"):
        assert word in text
    assert sum(file.stat().st_size for file in EMOJI.rglob("*") if file.is_file()) < 25_000_000


@pytest.mark.parametrize("remote", [(), ("unet",), ("clip", "unet", "vae")])
def test_its_pictures_are_those_of_diffusers_at_its_own_defaults(kit: Any, cluster: Any, remote: tuple[str, ...]) -> None:
    expected = kit.pictures(
        kit.plain(EMOJI), 3, prompt="a rocket", num_inference_steps=20, guidance_scale=4.0, width=64, height=64
    )
    events = cluster(EMOJI, remote).events(ImageRequest("a rocket", seed=3))
    assert [event.rgb for event in events if isinstance(event, ImageDone)] == expected
    assert sum(isinstance(event, ImageStep) for event in events) == 20


@pytest.mark.parametrize("prompt", COLOURS)
def test_what_it_paints_has_the_colour_of_its_prompt(cluster: Any, prompt: str) -> None:
    """The mean of what is not white, over three seeds."""
    pictures = cluster(EMOJI).paint(ImageRequest(prompt, seed=1, images=3))
    pixels = [rgb[i : i + 3] for rgb in pictures for i in range(0, len(rgb), 3) if min(rgb[i : i + 3]) < 200]
    mean = [sum(pixel[channel] for pixel in pixels) / len(pixels) for channel in range(3)]

    def distance(colour: tuple[int, int, int]) -> float:
        return sum((a - b) ** 2 for a, b in zip(mean, colour, strict=True))

    assert min(COLOURS, key=lambda name: distance(COLOURS[name])) == prompt
