"""POST /v1/images/generations, /v1/images/edits, and the seed's /api/v1/image."""

from __future__ import annotations

import base64
import time
from typing import Any

import msgspec
from litestar import Response, post
from litestar.datastructures import UploadFile
from litestar.params import JSONBody

from cake_core.errors import RequestError
from cake_core.requests import ImageRequest
from cake_core.runtime import ImageRuntime
from cake_server.images.answers import ImageAnswer, failed_frames
from cake_server.images.encode import check_format
from cake_server.images.params import openai_request, seed_request
from cake_server.routes.common import AnyRequest, Exchange, ServiceOf, answers_with, new_id
from cake_server.schemas.images import ImageFields, ImageGeneration, ImageList, SeedImageRequest, SeedImages
from cake_server.service import Service

_FILES = ("image", "image[]", "mask")


@post(["/v1/images/generations", "/images/generations"], status_code=200, responses=answers_with(ImageList))
async def generate_images(data: JSONBody[ImageGeneration], request: AnyRequest, service: ServiceOf) -> Response[Any]:
    """Paints images from a prompt; with `stream` as events, with `partial_images` previews among them."""
    runtime = service.image(data.model)
    wanted = openai_request(data, service.settings)
    return await _openai(data, wanted, request, service, runtime)


@post(["/v1/images/edits", "/images/edits"], status_code=200, responses=answers_with(ImageList))
async def edit_images(request: AnyRequest, service: ServiceOf) -> Response[Any]:
    """Paints over an image: multipart with `image`, `prompt`, and a `mask` whose white is repainted."""
    if request.content_type[0] != "multipart/form-data":
        raise RequestError("send multipart/form-data with the files image and, if you like, mask", "image")
    form = await request.form()
    images = [value for name in ("image", "image[]") for value in form.getall(name, []) if isinstance(value, UploadFile)]
    masks = [value for value in form.getall("mask", []) if isinstance(value, UploadFile)]
    if len(images) != 1 or len(masks) > 1:
        raise RequestError("give exactly one image, and at most one mask", "image")
    data = _fields(dict(form.multi_items()))
    runtime = service.image(data.model)
    mask = await masks[0].read() if masks else None
    wanted = openai_request(data, service.settings, await images[0].read(), mask)
    return await _openai(data, wanted, request, service, runtime, "image_edit")


def _fields(form: dict[str, Any]) -> ImageGeneration:
    """All values of a form are text; numbers and switches are read from it."""
    values = {name: value for name, value in form.items() if name not in _FILES}
    for name in ("stream", "progress"):
        if name in values:
            values[name] = str(values[name]).lower() in ("true", "1")
    try:
        return msgspec.convert(values, ImageGeneration, strict=False)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        raise RequestError(message, path.rstrip("`") or None) from error


async def _openai(
    data: ImageFields,
    wanted: ImageRequest,
    request: AnyRequest,
    service: Service,
    runtime: ImageRuntime,
    kind: str = "image_generation",
) -> Response[Any]:
    output = data.output_format or "png"
    check_format(output)
    exchange = Exchange.start(request, service, new_id("img"), runtime.engine, [wanted])
    answer = ImageAnswer(
        exchange.job,
        service.metrics,
        int(time.time()),
        output,
        data.output_compression,
        kind,
        data.partial_images or 0,
        bool(getattr(data, "progress", False)),
    )
    exchange = exchange.telling(lambda: {"steps": answer.steps, "images": wanted.images})
    if data.stream:
        return await exchange.stream(answer.frames(), failed_frames)
    if wanted.images == 1 and request.headers.get("accept") == "image/png" and output == "png":
        return await exchange.whole(_first_file(answer), media_type="image/png")
    return await exchange.whole(answer.whole())


async def _first_file(answer: ImageAnswer) -> bytes:
    return base64.b64decode((await answer.whole()).data[0].b64_json)


@post("/api/v1/image", status_code=200, responses=answers_with(SeedImages))
async def seed_image(data: JSONBody[SeedImageRequest], request: AnyRequest, service: ServiceOf) -> Response[Any]:
    """The original's endpoint: `{"image_args": {"sd-image-prompt": …}}` to `{"images": [base64 PNG, …]}`."""
    runtime = service.image()
    args = data.image_args
    wanted = seed_request(args, service.settings)
    exchange = Exchange.start(request, service, new_id("img"), runtime.engine, [wanted])
    answer = ImageAnswer(exchange.job, service.metrics, int(time.time()), partial_images=wanted.steps or 1000, progress=True)
    exchange = exchange.telling(lambda: {"steps": answer.steps, "images": wanted.images})
    if args.stream:
        return await exchange.stream(answer.frames(), failed_frames)
    return await exchange.whole(_seed_answer(answer))


async def _seed_answer(answer: ImageAnswer) -> SeedImages:
    return SeedImages(await answer.in_order())
