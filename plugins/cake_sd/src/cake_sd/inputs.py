"""What a request brings, checked: start images, masks, sizes, prompts."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cake_core.errors import RequestError
from cake_core.requests import ImageRequest

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 64 * 1024 * 1024
"""Of a picture that is decoded: a small file can claim a size that fills the memory."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """The start image and mask of a request, in the size that will be painted; the mask is white where it is painted anew."""

    width: int
    height: int
    image: Image
    mask: Image | None = None


def read_pictures(request: ImageRequest) -> Pictures | None:
    """None for a request without a start image. Raises RequestError for bytes that are no picture."""
    if request.init_image is None:
        if request.mask is not None:
            raise RequestError("a mask needs the image it belongs to; give the start image too", "mask")
        return None
    from PIL import Image

    image = _open(request.init_image, "init_image").convert("RGB")
    width = request.width or max(8, image.width // 8 * 8)
    height = request.height or max(8, image.height // 8 * 8)
    size = (width, height)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    if request.mask is None:
        return Pictures(width, height, image)
    mask = _open(request.mask, "mask")
    # A mask with transparency says by it what to paint; any other by its brightness.
    grey = mask.getchannel("A").point(lambda alpha: 255 - alpha) if mask.mode in ("RGBA", "LA") else mask.convert("L")
    return Pictures(width, height, image, grey if grey.size == size else grey.resize(size, Image.Resampling.NEAREST))


def _open(data: bytes, param: str) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise RequestError(f"{param} has {image.width} x {image.height} pixels; make it smaller", param)
        image.load()
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"{param} is not a picture that can be read; send a PNG, JPEG or WebP file", param) from error
    return image


def check_strength(request: ImageRequest, steps: int) -> None:
    """Raises RequestError when so little strength, times so few steps, is no step at all."""
    if int(min(steps * request.strength, steps)) < 1:
        raise RequestError(
            f"strength {request.strength:g} of {steps} steps is less than one step; use more steps or more strength", "strength"
        )


def cut_part(tokenizer: Any, prompt: str) -> str | None:
    """The end of a prompt that does not fit the tokenizer's model; None when all of it fits."""
    limit = int(tokenizer.model_max_length)
    if limit > 100_000:
        return None
    whole = tokenizer(prompt, truncation=False, verbose=False, return_offsets_mapping=tokenizer.is_fast)
    if len(whole.input_ids) <= limit:
        return None
    if tokenizer.is_fast:  # the user's own words, as they were written
        return prompt[whole.offset_mapping[limit - 1][0] :].strip()
    return str(tokenizer.decode(whole.input_ids[limit - 1 : -1])).strip()


def chunks(tokenizer: Any, prompt: str) -> list[str]:
    """The prompt cut between words into pieces that each fit; a single word that does not fit is left to be truncated."""
    limit = int(tokenizer.model_max_length)
    pieces: list[str] = []
    current = ""
    for word in prompt.split():
        longer = f"{current} {word}".strip()
        if current and len(tokenizer(longer, truncation=False, verbose=False).input_ids) > limit:
            pieces.append(current)
            longer = word
        current = longer
    return [*pieces, current]
