"""The options of one image job, under Cake's names and the seed's, and the request they build."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cake_core.cli.sections import option
from cake_core.errors import RequestError

if TYPE_CHECKING:
    from cake_core.requests import ImageRequest

PAINTING = "Images"
SEED_PROMPT = "A very realistic photo of a rusty robot walking on a sandy beach"

_PATH = click.Path(path_type=Path)
_OPTIONS = (
    option(PAINTING, "--output", "-o", type=_PATH, metavar="FILE", help="PNG to write; - for stdout."),
    option(PAINTING, "--negative-prompt", "--sd-uncond-prompt", default="", metavar="TEXT", help="What not to paint."),
    option(PAINTING, "--steps", "--sd-n-steps", type=int, metavar="N", help="Denoising steps."),
    option(PAINTING, "--guidance", "--sd-guidance-scale", type=float, metavar="X", help="Guidance scale."),
    option(PAINTING, "--width", "--sd-width", type=int, metavar="N", help="Width, a multiple of 8."),
    option(PAINTING, "--height", "--sd-height", type=int, metavar="N", help="Height, a multiple of 8."),
    option(PAINTING, "--n", "--sd-num-samples", "images", type=int, default=1, metavar="N", help="Images, seeds counting up."),
    option(PAINTING, "--sd-bsize", "batch", type=int, default=1, metavar="N", help="Images denoised at once; multiplies --n."),
    option(PAINTING, "--preview-every", "--sd-intermediary-images", type=int, default=0, metavar="N", help="Keep these steps."),
    option(PAINTING, "--init-image", "--sd-img2img", type=_PATH, metavar="FILE", help="Image to start from."),
    option(PAINTING, "--mask", type=_PATH, metavar="FILE", help="White where --init-image is repainted."),
    option(PAINTING, "--strength", "--sd-img2img-strength", type=float, default=0.8, metavar="X", help="How far from it."),
    option(PAINTING, "--sd-tracing", "tracing", is_flag=True, help="Write a chrome trace of the run to trace-*.json."),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ImageFlags:
    """The values of these options, field for option."""

    output: Path | None = None
    negative_prompt: str = ""
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    images: int = 1
    batch: int = 1
    preview_every: int = 0
    init_image: Path | None = None
    mask: Path | None = None
    strength: float = 0.8
    tracing: bool = False

    def request(self, prompt: str, seed: int, live: bool) -> ImageRequest:
        """Raises RequestError, naming the option, for values that cannot be. `live` asks for cheap previews to look at."""
        from cake_core.requests import ImageRequest

        if self.batch < 1:
            raise RequestError(f"--sd-bsize must be at least 1, not {self.batch}", "batch")
        if self.mask is not None and self.init_image is None:
            raise RequestError("--mask needs --init-image", "mask")
        return ImageRequest(
            prompt=prompt,
            negative_prompt=self.negative_prompt,
            width=self.width,
            height=self.height,
            steps=self.steps,
            guidance=self.guidance,
            seed=seed,
            images=self.images * self.batch,
            init_image=_read(self.init_image),
            mask=_read(self.mask),
            strength=self.strength,
            preview_every=self.preview_every or int(live),
            extra=self._extra(live),
        )

    def _extra(self, live: bool) -> dict[str, Any]:
        """The backend's own switches, as far as they were given."""
        extra: dict[str, Any] = {}
        if self.batch > 1:
            extra["batch"] = self.batch
        if self.tracing:
            extra["trace"] = True
        if live and not self.preview_every:
            extra["preview"] = "fast"
        return extra


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read the image {path}: {error.strerror}", "init_image") from error


def image_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command, which gets them as the one argument `painting`."""
    names = {f.name for f in fields(ImageFlags)}

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        values = {name: kwargs.pop(name) for name in names}
        return function(*args, painting=ImageFlags(**values), **kwargs)

    result: Callable[..., Any] = wrapper
    for add in reversed(_OPTIONS):
        result = add(result)
    return result
