"""The image toy: `clip`, `unet` and `vae` in plain Python; every picture depends on all three and on the seed.

- `clip.encode(tokens i32 [n]) -> embedding f32 [8]`
- `unet.denoise(latents f32 [4, h, w]; constants positive, negative f32 [8]; scalars step, steps, guidance) -> latents`
- `vae.decode(latents f32 [4, h, w]) -> image u8 [8h, 8w, 3]`

The option `seconds_per_step` (config.json or `LoadOptions.extra`) makes the unet slow.
"""

from __future__ import annotations

import itertools
import math
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from cake_core import png
from cake_core.checkpoint import Checkpoint
from cake_core.errors import Cancelled, ConfigError, RequestError, StageError
from cake_core.events import ImageDone, ImageEvent, ImagePreview, ImageStep
from cake_core.model import (
    BACKEND_API,
    Component,
    Layer,
    LoadOptions,
    Memory,
    ModelInfo,
    Progress,
    Tensor,
    float32_values,
    int32_tensor,
    int32_values,
)
from cake_core.requests import ImageRequest
from cake_core.sampling import uniform
from cake_core.testing.toy_answers import float32_tensor
from cake_core.testing.toy_checkpoint import HIDDEN, IMAGE_TYPE, PRIME, check_shapes, read_tensor

CHANNELS = 4
SCALE = 8
DEFAULT_SIZE = 64
DEFAULT_STEPS = 4
DEFAULT_GUIDANCE = 7.5
_ROWS = {"clip": 2, "unet": 8, "vae": 3}
_METHODS = {"clip": "encode", "unet": "denoise", "vae": "decode"}


class ToyImageBackend:
    api: ClassVar[int] = BACKEND_API
    name = "toy-image"
    model_type: Literal["text", "image"] = "image"
    streams: ClassVar[Literal[True]] = True

    def accepts(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.config.get("model_type") == IMAGE_TYPE

    def describe(self, checkpoint: Checkpoint, options: LoadOptions) -> ModelInfo:
        check_shapes(checkpoint, {f"{name}.weight": ("U8", (rows, HIDDEN)) for name, rows in _ROWS.items()})
        layers = tuple(
            Layer(name, rows * HIDDEN, (f"{name}.weight",), file_nbytes=rows * HIDDEN, stateless=True)
            for name, rows in _ROWS.items()
        )
        return ModelInfo(self.name, "image", checkpoint.name, "ToyImagePipeline", layers)

    def load(
        self, checkpoint: Checkpoint, info: ModelInfo, layer: str, options: LoadOptions, progress: Progress | None = None
    ) -> ToyComponent:
        if layer not in _ROWS:
            raise ConfigError(f"the toy image model has no layer {layer!r}; it has {', '.join(_ROWS)}")
        weights = read_tensor(checkpoint, f"{layer}.weight")
        seconds = float(options.extra.get("seconds_per_step", checkpoint.config.get("seconds_per_step", 0)))
        if progress is not None:
            progress(info.layer(layer).nbytes, info.layer(layer).nbytes)
        return ToyComponent(layer, weights, seconds if layer == "unet" else 0.0)

    def assemble(
        self, checkpoint: Checkpoint, info: ModelInfo, components: Mapping[str, Sequence[Component]], options: LoadOptions
    ) -> ToyImageModel:
        missing = [name for name in _ROWS if not components.get(name)]
        if missing:
            raise ConfigError(f"the toy image model lacks {', '.join(missing)}; place every layer on a node")
        return ToyImageModel(components)


class ToyComponent:
    """One component; `load` returned it, so `assemble` may get this very object or a remote twin."""

    def __init__(self, name: str, weights: Sequence[Sequence[float]], seconds: float) -> None:
        self.name = name
        self._weights = weights
        self._seconds = seconds

    def call(
        self,
        method: str,
        request: int,
        tensors: Mapping[str, Tensor],
        scalars: Mapping[str, Any],
        constants: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        if method != _METHODS[self.name]:
            raise StageError(f"{self.name} has no method {method!r}; it has {_METHODS[self.name]}")
        time.sleep(self._seconds)
        if self.name == "clip":
            return {"embedding": _encode(self._weights, int32_values(tensors["tokens"]))}
        if self.name == "unet":
            return {"latents": _denoise(self._weights, tensors["latents"], scalars, constants)}
        return {"image": _decode(self._weights, tensors["latents"])}

    def close(self, request: int) -> None:
        """Nothing is kept for a request."""

    def memory(self) -> Memory:
        return Memory("cpu", "f32", _ROWS[self.name] * HIDDEN)

    def shutdown(self) -> None:
        """Nothing is held."""


def _encode(weights: Sequence[Sequence[float]], tokens: Sequence[int]) -> Tensor:
    state = [0] * HIDDEN
    for token in tokens:
        state = [int(a * s + b * (token + 1)) % PRIME for s, a, b in zip(state, *weights, strict=True)]
    return float32_tensor([value / PRIME for value in state])


def _denoise(
    weights: Sequence[Sequence[float]], latents: Tensor, scalars: Mapping[str, Any], constants: Mapping[str, Tensor]
) -> Tensor:
    """Moves the latents towards waves whose frequencies and phases the two embeddings give, 1/(steps left) of the way."""
    pairs = zip(float32_values(constants["positive"]), float32_values(constants["negative"]), strict=True)
    guided = [negative + scalars["guidance"] * (positive - negative) for positive, negative in pairs]
    _, height, width = latents.shape
    share = 1.0 / (scalars["steps"] - scalars["step"])
    values = float32_values(latents)
    for channel in range(CHANNELS):
        fx, fy, phase, gain = (
            sum(
                w / PRIME * g for w, g in zip(weights[(channel + row) % len(weights)], guided[row:] + guided[:row], strict=True)
            )
            for row in range(4)
        )
        for y, x in itertools.product(range(height), range(width)):
            index = (channel * height + y) * width + x
            target = math.sin(0.03 * fx * x + 0.03 * fy * y + phase + math.tanh(gain) * math.tanh(values[index]))
            values[index] += share * (target - values[index])
    return Tensor("f32", latents.shape, array("f", values).tobytes())


def _decode(weights: Sequence[Sequence[float]], latents: Tensor) -> Tensor:
    """Each latent place becomes a square of one colour."""
    _, height, width = latents.shape
    values, area = float32_values(latents), height * width
    lines = []
    for y in range(height):
        line = bytearray()
        for x in range(width):
            place = values[y * width + x :: area]
            line += bytes(_level(row, place) for row in weights) * SCALE
        lines.append(bytes(line) * SCALE)
    return Tensor("u8", (height * SCALE, width * SCALE, 3), b"".join(lines))


def _level(row: Sequence[float], place: Sequence[float]) -> int:
    mixed = sum((w / PRIME - 0.5) * v for w, v in zip(row, place, strict=False))
    return round(127.5 + 127.5 * math.tanh(1.5 * mixed))


class ToyImageModel:
    """The denoising loop. Replicas of a component take turns, an image each."""

    def __init__(self, components: Mapping[str, Sequence[Component]]) -> None:
        self._components = components
        self._requests = itertools.count(1)

    def generate(self, request: ImageRequest, emit: Callable[[ImageEvent], None], cancelled: Callable[[], bool]) -> None:
        if request.init_image is not None or request.mask is not None:
            raise RequestError("the toy image model starts from noise only; leave init_image and mask out", "init_image")
        number = next(self._requests)
        try:
            positive, negative = (self._encode(number, text) for text in (request.prompt, request.negative_prompt))
            constants = {"positive": positive, "negative": negative}
            for image in range(request.images):
                self._paint(number, image, request, constants, emit, cancelled)
        finally:
            for component in itertools.chain.from_iterable(self._components.values()):
                component.close(number)

    def shutdown(self) -> None:
        for component in itertools.chain.from_iterable(self._components.values()):
            component.shutdown()

    def _pick(self, name: str, image: int) -> Component:
        return self._components[name][image % len(self._components[name])]

    def _encode(self, number: int, text: str) -> Tensor:
        tokens = int32_tensor(list(text.encode("utf-8", "replace")))
        return self._pick("clip", 0).call("encode", number, {"tokens": tokens}, {}, {})["embedding"]

    def _paint(
        self,
        number: int,
        image: int,
        request: ImageRequest,
        constants: Mapping[str, Tensor],
        emit: Callable[[ImageEvent], None],
        cancelled: Callable[[], bool],
    ) -> None:
        steps = request.steps or DEFAULT_STEPS
        width, height = request.width or DEFAULT_SIZE, request.height or DEFAULT_SIZE
        guidance = DEFAULT_GUIDANCE if request.guidance is None else request.guidance
        seed = request.seed + image
        latents, unet = _noise(seed, height // SCALE, width // SCALE), self._pick("unet", image)
        for step in range(steps):
            if cancelled():
                raise Cancelled("the image was cancelled")
            began = time.monotonic()
            scalars = {"step": step, "steps": steps, "guidance": guidance}
            latents = unet.call("denoise", number, {"latents": latents}, scalars, constants)["latents"]
            emit(ImageStep(image, step + 1, steps, time.monotonic() - began))
            if request.preview_every and (step + 1) % request.preview_every == 0 and step + 1 < steps:
                emit(ImagePreview(image, step + 1, png.encode(self._decode(number, image, latents), width, height)))
        emit(ImageDone(image, width, height, self._decode(number, image, latents), seed))

    def _decode(self, number: int, image: int, latents: Tensor) -> bytes:
        return bytes(self._pick("vae", image).call("decode", number, {"latents": latents}, {}, {})["image"].data)


def _noise(seed: int, height: int, width: int) -> Tensor:
    count = CHANNELS * height * width
    values = array("f", (4 * uniform(seed, 0, index) - 2 for index in range(count)))
    return Tensor("f32", (CHANNELS, height, width), values.tobytes())
