"""Single-file checkpoints: all components of a model in one `.safetensors` file, under the names of the original trainers.

A `SingleFileCheckpoint` shows such a file as a diffusers folder. The configurations that it lacks are those of the version
its tensors give away, or those of `--sd-config`. A node reads, and brings to diffusers' names, its own components only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cake_core.checkpoint import Checkpoint, SafetensorsCheckpoint, TensorInfo
from cake_core.config import load_options
from cake_core.errors import CheckpointError, ConfigError
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_sd.options import SdOptions
from cake_sd.shapes import Files, made, model_files, write_files

PREFIXES: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
    "vae": ("first_stage_model.", "vae."),
}
"""Folder of a diffusers model -> how the names of its tensors begin in single files."""

DENOISER = "model.diffusion_model."
BARE = ("double_blocks.", "joint_blocks.")
"""How the denoiser's begin; the second in files that hold nothing else."""

_OTHERS = tuple(prefix for found in PREFIXES.values() for prefix in found)
_FIRST = DENOISER + "input_blocks.0.0.weight"
_ATTENTION = DENOISER + "input_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight"
_ADDED = DENOISER + "label_emb.0.0.weight"


def is_single_file(checkpoint: Checkpoint) -> bool:
    """Whether it holds a pipeline under its trainers' names, or is a bundle of one: told by the denoiser, whose headers each
    bundle has."""
    marks = (DENOISER, *BARE)
    return isinstance(checkpoint, SafetensorsCheckpoint) and any(name.startswith(marks) for name in checkpoint.headers)


class SingleFileCheckpoint(DiffusersCheckpoint):
    """A single file as a diffusers folder: `path` is a folder of configurations, tensors keep their names in the file."""

    def __init__(self, source: Checkpoint, path: Path) -> None:
        super().__init__(path, source.name)
        self.source = source
        self._others = DiffusersCheckpoint(path)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.source.tensors

    @property
    def headers(self) -> Mapping[str, TensorInfo]:
        return self.source.headers

    def component_headers(self, component: str) -> Mapping[str, TensorInfo]:
        """What the file lacks may be in the folder of the configurations."""
        return component_tensors(self.headers, component) or self._others.component_headers(component)

    def component_files(self, component: str) -> list[Path]:
        own = {tensor.file for tensor in component_tensors(self.tensors, component).values()}
        return sorted(own) or self._others.component_files(component)

    def holds(self, component: str) -> bool:
        """Whether the file itself has the component's weights."""
        return bool(component_tensors(self.tensors, component))


def component_tensors(tensors: Mapping[str, TensorInfo], component: str) -> dict[str, TensorInfo]:
    """Those that are one component's, by the name of its folder."""
    if component in PREFIXES:
        return {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIXES[component])}
    if component not in ("unet", "transformer"):
        return {}
    if any(name.startswith(DENOISER) for name in tensors):
        return {name: tensor for name, tensor in tensors.items() if name.startswith(DENOISER)}
    if any(name.startswith(BARE) for name in tensors):
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(_OTHERS)}
    return {}


def open_single(source: Checkpoint, sd: SdOptions) -> SingleFileCheckpoint:
    """Raises ConfigError for a file whose version is not known here when no `--sd-config` names one that is like it."""
    return SingleFileCheckpoint(source, _given(sd.config) if sd.config else _derived(source, sd.version))


def _given(reference: str) -> Path:
    from cake_core.resolve import resolve
    from cake_sd.hub import resolve as resolve_version

    found = resolve_version(reference) or resolve(reference)
    if not isinstance(found, DiffusersCheckpoint):
        raise ConfigError(f"--sd-config {reference} is no diffusers model; name one that the file was made from")
    return found.path


def version_of(headers: Mapping[str, TensorInfo]) -> str | None:
    """The version whose architecture the denoiser has: by the width of its text conditioning, and by XL's second input."""
    first = next((headers[name] for n in (1, 2, 4) if (name := _ATTENTION.format(n)) in headers), None)
    if first is None or _FIRST not in headers:
        return None
    width = first.shape[-1]
    if _ADDED in headers:
        return "xl" if width == 2048 else None
    return {768: "v1-5", 1024: "v2-1"}.get(width)


def derived_files(headers: Mapping[str, TensorInfo], asked: str | None) -> Files | None:
    """Configurations of the file's version; `asked` tells Turbo, which looks like XL. None for an unknown architecture."""
    version = version_of(headers)
    if version is None:
        return None
    files = model_files("turbo" if (version, asked) == ("xl", "turbo") else version)
    files["unet/config.json"]["in_channels"] = headers[_FIRST].shape[1]  # 9 in models made for inpainting
    return files


def _derived(source: Checkpoint, asked: str | None) -> Path:
    files = derived_files(source.headers, asked)
    if files is None:
        raise ConfigError(
            f"{source.path} is a single file of a kind whose configuration Cake does not know (it knows those of Stable "
            "Diffusion 1, 2, XL and Turbo): name a diffusers folder or hub id of the model it was made from with --sd-config"
        )
    folder = load_options().cache_dir / "single" / hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
    with made(folder) as new:
        if new is not None:
            write_files(new, files)
    return folder


def load_tensors(
    real: type[Any], tensors: Mapping[str, TensorInfo], configs: Path, component: str, arguments: Mapping[str, Any]
) -> Any:
    """A component of class `real` from tensors under either naming. `arguments`: its dtype.

    Raises CheckpointError when they do not fit the configuration, or some are missing.
    """
    from diffusers.loaders import single_file_utils as ldm

    where = {"config": str(configs), "subfolder": component, "local_files_only": True}
    try:
        state = _read(tensors.values())
        if hasattr(real, "from_single_file"):
            module = real.from_single_file(state, **where, **arguments)
        else:
            made: Any = getattr(ldm, _MAKERS["T5" if "T5" in real.__name__ else "CLIP"])
            module = made(real, state, torch_dtype=next(iter(arguments.values())), **where)
        lacking = [name for name, value in module.named_parameters() if value.is_meta]
    except (ValueError, LookupError, RuntimeError, OSError, AttributeError, ldm.SingleFileComponentError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        lacking = [reason]
    if lacking:
        file = next(iter(tensors.values())).file
        raise CheckpointError(
            f"{file}: what it has of {component} does not fit the configuration of a {real.__name__} ({lacking[0]}); name the "
            "model that the file was made from with --sd-config"
        )
    return module


_MAKERS = {"T5": "create_diffusers_t5_model_from_checkpoint", "CLIP": "create_diffusers_clip_model_from_ldm"}


def _read(tensors: Iterable[TensorInfo]) -> dict[str, Any]:
    from safetensors import safe_open

    by_file: dict[Path, list[str]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.file, []).append(tensor.name)
    state: dict[str, Any] = {}
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as opened:
            # Copied out of the mapped file, so that a whole file and a bundle of it give the same bits: where a tensor
            # happens to lie in its file decides by which kernel it is multiplied.
            state |= {name: opened.get_tensor(name).clone() for name in names}
    return state
