"""From a request to the arguments of a diffusers pipeline: sizes, steps, defaults, warnings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cake_core.errors import ConfigError, RequestError
from cake_core.events import ImageWarning
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.requests import ImageRequest
from cake_sd.inputs import Pictures, check_strength, cut_part, read_pictures
from cake_sd.lane import Lane, Task, accepted
from cake_sd.options import Asked, SdOptions, request_options
from cake_sd.versions import Version, version_named

DEFAULTS_FILE = "generation_config.json"
"""Beside model_index.json, optional: what the model's maker advises, named as the pipeline's arguments."""

TRUE_GUIDANCE = 4.0
"""Guidance by a negative prompt for models whose own guidance is distilled into them, unless the request says another."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Images `first` .. of the request, painted in one go, from these seeds."""

    first: int
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A request, checked against the model. `call`: plain arguments of the pipeline, but for seeds and pictures."""

    task: Task
    width: int
    height: int
    call: Mapping[str, Any]
    batches: tuple[Batch, ...]
    asked: Asked
    scheduler: str | None
    preview_every: int
    pictures: Pictures | None = None
    warnings: tuple[ImageWarning, ...] = ()


def make_plan(request: ImageRequest, lane: Lane, checkpoint: DiffusersCheckpoint, sd: SdOptions) -> Plan:
    """Raises RequestError, naming the parameter, for what this model cannot do."""
    asked = request_options(request, sd)
    pictures = read_pictures(request)
    task: Task = "text2img" if pictures is None else "img2img" if pictures.mask is None else "inpaint"
    version = version_named(asked.version) if asked.version else None
    scheduler = asked.scheduler or (version.scheduler if version else None)
    pipeline = lane.pipeline(task, scheduler)
    if version:
        _check_version(version, pipeline, asked_for=not sd.version)
    takes = accepted(pipeline)
    width, height = _size(request, pictures, pipeline, version, sd)
    call = {**_defaults(checkpoint, version), **_asked(request, asked, takes, pipeline)}
    if pictures is not None:
        call["strength"] = request.strength
        check_strength(request, int(call.get("num_inference_steps", 50)))
    call |= {name: value for name, value in (("width", width), ("height", height)) if name in takes}
    if "use_resolution_binning" in takes:
        call["use_resolution_binning"] = False  # the size that was asked for, not the nearest the model was trained on
    warnings = () if asked.long_prompts else _cut_prompts(request, pipeline)
    return Plan(
        task, width, height, call, _batches(request, asked.batch), asked, scheduler, request.preview_every, pictures, warnings
    )


def _size(
    request: ImageRequest, pictures: Pictures | None, pipeline: Any, version: Version | None, sd: SdOptions
) -> tuple[int, int]:
    if pictures is not None:
        size = (pictures.width, pictures.height)
    else:
        default = version.size if version else _own_size(pipeline)
        size = (request.width or sd.width or default, request.height or sd.height or default)
    multiple = int(getattr(pipeline, "vae_scale_factor", 8)) * (2 if hasattr(pipeline, "_pack_latents") else 1)
    for name, value in zip(("width", "height"), size, strict=True):
        if value % multiple:
            raise RequestError(f"{name} must be a multiple of {multiple} for this model, not {value}", name)
    return size


def _own_size(pipeline: Any) -> int:
    denoiser: Any = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    sample = getattr(pipeline, "default_sample_size", None) or getattr(denoiser.config, "sample_size", None) or 64
    sample = sample[0] if isinstance(sample, (list, tuple)) else sample
    return int(sample) * int(getattr(pipeline, "vae_scale_factor", 8))


def _check_version(version: Version, pipeline: Any, asked_for: bool) -> None:
    unet = getattr(pipeline, "unet", None)
    width = getattr(getattr(unet, "config", None), "cross_attention_dim", None)
    if width != version.cross_attention and asked_for:
        raise RequestError(f"the model that is served is no {version.name}; leave version out", "version")
    if width != version.cross_attention:
        raise ConfigError(
            f"the model is no {version.name}: its text conditioning is {width} wide, not {version.cross_attention}; leave "
            "--sd-version out, or name the model with --model"
        )


def _defaults(checkpoint: DiffusersCheckpoint, version: Version | None) -> dict[str, Any]:
    """What a request that says nothing gets, where it is not left to the pipeline."""
    if version is not None:
        return {"num_inference_steps": version.steps, "guidance_scale": version.guidance}
    own = checkpoint.json(DEFAULTS_FILE) or {}
    return {name: own[name] for name in ("num_inference_steps", "guidance_scale") if name in own}


def _asked(request: ImageRequest, asked: Asked, takes: frozenset[str], pipeline: Any) -> dict[str, Any]:
    call: dict[str, Any] = {"prompt": request.prompt}
    if request.steps is not None:
        call["num_inference_steps"] = request.steps
    if request.guidance is not None:
        call["guidance_scale"] = request.guidance
    if request.negative_prompt:
        call["negative_prompt"] = request.negative_prompt
        if "true_cfg_scale" in takes:
            call["true_cfg_scale"] = TRUE_GUIDANCE if request.guidance is None else request.guidance
    if asked.clip_skip:
        call["clip_skip"] = asked.clip_skip
    for name, param in (("guidance_scale", "guidance"), ("negative_prompt", "negative_prompt"), ("clip_skip", "clip_skip")):
        if name in call and name not in takes:
            raise RequestError(f"{type(pipeline).__name__} has no {param}; leave it out", param)
    return call


def _batches(request: ImageRequest, size: int) -> tuple[Batch, ...]:
    """One image each unless more are asked for: an image then does not depend on its neighbours, to the last bit."""
    seeds = [(request.seed + index) % 2**63 for index in range(request.images)]
    return tuple(Batch(first, tuple(seeds[first : first + size])) for first in range(0, len(seeds), size))


def _cut_prompts(request: ImageRequest, pipeline: Any) -> tuple[ImageWarning, ...]:
    """A warning for each prompt that is longer than the shortest tokenizer takes, with what will be lost."""
    tokenizers = [getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
    shortest = min((t for t in tokenizers if t is not None), key=lambda t: t.model_max_length, default=None)
    warnings = []
    for name, prompt in (("prompt", request.prompt), ("negative prompt", request.negative_prompt)):
        if shortest is not None and (cut := cut_part(shortest, prompt)):
            warnings.append(
                ImageWarning(
                    f"the {name} is longer than {shortest.model_max_length} tokens; cut off: {cut!r}. Shorten it, or use "
                    "long prompts (--sd-long-prompts)"
                )
            )
    return tuple(warnings)
