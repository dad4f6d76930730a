"""The image backend: any diffusers pipeline whose unet or transformer denoises latents. Imports torch only to load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from cake_core.checkpoint import Checkpoint
from cake_core.errors import ConfigError
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.model import BACKEND_API, Component, ImageModel, LoadOptions, ModelInfo, Progress
from cake_sd import layout
from cake_sd.options import SdOptions, process_options
from cake_sd.single import SingleFileCheckpoint, is_single_file, open_single

if TYPE_CHECKING:
    from cake_sd.components import TorchComponent


class SdBackend:
    """Layers `clip`, `clip2`, `clip3`, `unet` or `transformer`, `vae`; all of them stateless, so each may have replicas."""

    api: ClassVar[int] = BACKEND_API
    name = "sd"
    model_type: Literal["text", "image"] = "image"

    def accepts(self, checkpoint: Checkpoint) -> bool:
        return isinstance(checkpoint, DiffusersCheckpoint) or is_single_file(checkpoint)

    def describe(self, checkpoint: Checkpoint, options: LoadOptions) -> ModelInfo:
        return layout.describe(_diffusers(checkpoint, process_options(options)), options, self.name)

    def warm(self) -> None:
        import cake_sd.loading  # noqa: F401 - torch comes with it
        from cake_sd.quiet import quieten

        quieten()

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
        found = _diffusers(checkpoint, sd)
        if isinstance(found, SingleFileCheckpoint):
            from cake_sd.vocabulary import add_tokenizers

            add_tokenizers(found, sd.tokenizers)
        return Painter(found, info, components, sd)


def _diffusers(checkpoint: Checkpoint, sd: SdOptions) -> DiffusersCheckpoint:
    """The folder, with the files that `--sd-use-f16` wants where it has them; a single file as such a folder."""
    if not isinstance(checkpoint, DiffusersCheckpoint):
        return open_single(checkpoint, sd)
    if sd.config is not None:
        raise ConfigError(f"{checkpoint.path} has its own configuration; leave --sd-config out, which is for single files")
    if sd.use_f16 is None:
        return checkpoint
    return type(checkpoint)(checkpoint.path, checkpoint.name, "fp16" if sd.use_f16 else "")
