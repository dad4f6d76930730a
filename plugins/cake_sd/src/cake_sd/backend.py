"""The image backend: any diffusers pipeline whose unet or transformer denoises latents. Imports torch only to load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from cake_core.checkpoint import Checkpoint
from cake_core.errors import UnsupportedModel
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.model import BACKEND_API, Component, ImageModel, LoadOptions, ModelInfo, Progress
from cake_sd import layout
from cake_sd.convert import is_single_file
from cake_sd.options import SdOptions, process_options

if TYPE_CHECKING:
    from cake_sd.components import TorchComponent


class SdBackend:
    """Layers `clip`, `clip2`, `clip3`, `unet` or `transformer`, `vae`; all of them stateless, so each may have replicas."""

    api: ClassVar[int] = BACKEND_API
    name = "sd"
    model_type: Literal["text", "image"] = "image"

    def accepts(self, checkpoint: Checkpoint) -> bool:
        """Also a single-file checkpoint, to say at `describe` how it is converted."""
        if isinstance(checkpoint, DiffusersCheckpoint):
            return True
        return checkpoint.path.is_file() and is_single_file(checkpoint.path)

    def describe(self, checkpoint: Checkpoint, options: LoadOptions) -> ModelInfo:
        return layout.describe(_diffusers(checkpoint, process_options(options)), options, self.name)

    def load(
        self, checkpoint: Checkpoint, info: ModelInfo, layer: str, options: LoadOptions, progress: Progress | None = None
    ) -> TorchComponent:
        from cake_sd.loading import load_component

        sd = process_options(options)
        return load_component(_diffusers(checkpoint, sd), info, layer, options, sd, progress)

    def assemble(
        self,
        checkpoint: Checkpoint,
        info: ModelInfo,
        components: Mapping[str, Sequence[Component]],
        options: LoadOptions,
    ) -> ImageModel:
        from cake_sd.painter import Painter

        sd = process_options(options)
        return Painter(_diffusers(checkpoint, sd), info, components, sd)


def _diffusers(checkpoint: Checkpoint, sd: SdOptions) -> DiffusersCheckpoint:
    """The folder, with the files that `--sd-use-f16` wants where it has them."""
    if not isinstance(checkpoint, DiffusersCheckpoint):
        raise UnsupportedModel(
            f"{checkpoint.path} is a single-file checkpoint; convert it once with `python -m cake_sd.convert "
            f"{checkpoint.path} FOLDER --config DIFFUSERS_FOLDER`, then use --model FOLDER"
        )
    if sd.use_f16 is None:
        return checkpoint
    return type(checkpoint)(checkpoint.path, checkpoint.name, "fp16" if sd.use_f16 else "")
