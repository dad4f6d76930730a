"""Images: OpenAI's shape, and the seed's."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType, field


class ImageFields(Struct, kw_only=True):
    """What generations and edits share. `steps`, `guidance_scale` and the like are this server's own."""

    prompt: str
    model: str | None = None
    n: int | None = None
    size: str | None = None
    response_format: str | None = None
    output_format: str | None = None
    output_compression: int | None = None
    quality: str | None = None
    style: str | None = None
    background: str | None = None
    moderation: str | None = None
    user: str | None = None
    stream: bool | None = None
    partial_images: int | None = None
    negative_prompt: str | None = None
    steps: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    cfg_scale: float | None = None
    seed: int | None = None
    scheduler: str | None = None
    strength: float | None = None


class ImageGeneration(ImageFields, kw_only=True):
    progress: bool | None = None


class ImageItem(Struct, kw_only=True):
    b64_json: str
    revised_prompt: str | None = None
    seed: int


class ImageTimings(Struct):
    steps: int
    seconds: float
    seconds_per_step: float


class ImageList(Struct, kw_only=True):
    created: int
    data: list[ImageItem]
    output_format: str
    size: str
    quality: str = "auto"
    background: str = "opaque"
    timings: ImageTimings
    warnings: list[str] | UnsetType = UNSET


class ImageArgs(Struct, kw_only=True, rename=lambda name: f"sd-{name.replace('_', '-')}"):
    """The seed's keys. `sd-image-seed` is what its README wrote where its code read `sd-seed`."""

    image_prompt: str | None = None
    uncond_prompt: str | None = None
    tracing: bool | None = None
    n_steps: int | None = None
    num_samples: int | None = None
    bsize: int | None = None
    intermediary_images: int | None = None
    guidance_scale: float | None = None
    img2img: str | None = None
    img2img_strength: float | None = None
    seed: int | None = None
    image_seed: int | None = None
    width: int | None = None
    height: int | None = None
    scheduler: str | None = None
    clip_skip: int | None = None
    prompt: str | None = field(default=None, name="prompt")
    steps: int | None = field(default=None, name="n-steps")
    guidance: float | None = field(default=None, name="guidance-scale")
    short_image_seed: int | None = field(default=None, name="image-seed")
    stream: bool | None = field(default=None, name="stream")


class SeedImageRequest(Struct):
    image_args: ImageArgs


class SeedImages(Struct):
    images: list[str]


class ImageProgress(Struct, kw_only=True):
    type: str = "image.progress"
    image: int
    step: int
    steps: int
    s_per_it: float
    eta_ms: int
