"""Image request fields, OpenAI's and the seed's, to an `ImageRequest`."""

from __future__ import annotations

import base64
import binascii
import re
import secrets
from typing import Any

from cake_core.errors import RequestError
from cake_core.requests import ImageRequest
from cake_server.errors import unsupported
from cake_server.schemas.images import ImageArgs, ImageFields
from cake_server.settings import Settings

MAX_IMAGES = 10
MAX_PARTIAL = 3
MAX_PROMPT = 32_000
MAX_GUIDANCE = 1000
"""Far beyond any use; further on the arithmetic of a model overflows."""
ASSUMED_STEPS = 20
"""Steps to spread previews over when the request leaves their number to the model."""

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_PROMPT = "A very realistic photo of a rusty robot walking on a sandy beach"


def openai_request(
    body: ImageFields, settings: Settings, init_image: bytes | None = None, mask: bytes | None = None
) -> ImageRequest:
    """Raises RequestError naming the field."""
    _refuse(body)
    count = 1 if body.n is None else body.n
    if not 1 <= count <= MAX_IMAGES:
        raise RequestError(f"n must be between 1 and {MAX_IMAGES}, not {count}", "n")
    width, height = parse_size(body.size)
    steps = body.steps if body.steps is not None else body.num_inference_steps
    return _checked(
        ImageRequest(
            prompt=_prompt(body.prompt, "prompt"),
            negative_prompt=_prompt(body.negative_prompt or "", "negative_prompt"),
            width=width,
            height=height,
            steps=steps,
            guidance=body.guidance_scale if body.guidance_scale is not None else body.cfg_scale,
            seed=_seed(body.seed),
            images=count,
            init_image=init_image,
            mask=mask,
            strength=0.8 if body.strength is None else body.strength,
            preview_every=_preview_every(body.partial_images, steps),
            extra={} if body.scheduler is None else {"scheduler": body.scheduler},
        ),
        settings,
    )


def _refuse(body: ImageFields) -> None:
    if body.response_format not in (None, "b64_json"):
        raise unsupported("response_format", "images come as b64_json; this server stores none to link to")
    if body.output_format not in (None, "png", "jpeg", "webp"):
        raise RequestError(f"output_format is png, jpeg or webp, not {body.output_format!r}", "output_format")
    if body.background not in (None, "auto", "opaque"):
        raise unsupported("background", "the model paints opaque images only")
    if body.partial_images is not None and not 0 <= body.partial_images <= MAX_PARTIAL:
        raise RequestError(f"partial_images must be between 0 and {MAX_PARTIAL}, not {body.partial_images}", "partial_images")
    if body.output_compression is not None and not 0 <= body.output_compression <= 100:
        raise RequestError("output_compression must be between 0 and 100", "output_compression")


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    if size in (None, "", "auto"):
        return None, None
    match = _SIZE.fullmatch(size or "")
    if match is None:
        raise RequestError(f"size is WIDTHxHEIGHT or auto, not {size!r}", "size")
    return int(match[1]), int(match[2])


def _preview_every(partial: int | None, steps: int | None) -> int:
    return 0 if not partial else max(1, (steps or ASSUMED_STEPS) // (partial + 1))


def _prompt(text: str, param: str) -> str:
    if len(text) > MAX_PROMPT:
        raise RequestError(f"{param} may have at most {MAX_PROMPT} characters, not {len(text)}", param)
    return text


def _seed(seed: int | None) -> int:
    return secrets.randbits(32) if seed is None or seed == -1 else seed


def _checked(request: ImageRequest, settings: Settings) -> ImageRequest:
    if (request.width or 0) * (request.height or 0) > settings.max_pixels:
        raise RequestError(f"an image may have at most {settings.max_pixels} pixels", "size")
    if (request.steps or 0) > settings.max_steps:
        raise RequestError(f"at most {settings.max_steps} steps, not {request.steps}", "steps")
    if abs(request.guidance or 0) > MAX_GUIDANCE:
        raise RequestError(f"guidance_scale is {MAX_GUIDANCE} at most, not {request.guidance:g}", "guidance_scale")
    return request


def seed_request(args: ImageArgs, settings: Settings) -> ImageRequest:
    """The seed's keys, with its defaults. The README's `sd-image-seed` seeds too, which in the seed it did not."""
    samples, batch = args.num_samples or 1, args.bsize or 1
    if samples < 1 or batch < 1 or samples * batch > MAX_IMAGES * MAX_IMAGES:
        raise RequestError(f"sd-num-samples times sd-bsize must be between 1 and {MAX_IMAGES * MAX_IMAGES}", "sd-num-samples")
    given: list[str | None] = [args.image_prompt, args.prompt]
    extra: dict[str, Any] = {"batch": batch} if batch > 1 else {}
    extra |= {"scheduler": args.scheduler} if args.scheduler is not None else {}
    extra |= {"clip_skip": args.clip_skip} if args.clip_skip is not None else {}
    extra |= {"trace": True} if args.tracing else {}
    seeds = (args.seed, args.image_seed, args.short_image_seed)
    return _checked(
        ImageRequest(
            prompt=_prompt(next((text for text in given if text is not None), _PROMPT), "sd-image-prompt"),
            negative_prompt=_prompt(args.uncond_prompt or "", "sd-uncond-prompt"),
            width=args.width,
            height=args.height,
            steps=args.n_steps if args.n_steps is not None else args.steps,
            guidance=args.guidance_scale if args.guidance_scale is not None else args.guidance,
            seed=_seed(next((seed for seed in seeds if seed is not None), None)),
            images=samples * batch,
            init_image=None if args.img2img is None else decode_image(args.img2img, "sd-img2img"),
            strength=0.8 if args.img2img_strength is None else args.img2img_strength,
            preview_every=args.intermediary_images or 0,
            extra=extra,
        ),
        settings,
    )


def decode_image(text: str, param: str) -> bytes:
    """Base64 or a `data:` URL. A path, which the seed took here, would let anyone read the master's disk."""
    payload = text.partition(",")[2] if text.startswith("data:") else text
    try:
        data = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{param} is an image in base64 or a data: URL; paths are not read over HTTP", param) from error
    if not data:
        raise RequestError(f"{param} is empty", param)
    return data
