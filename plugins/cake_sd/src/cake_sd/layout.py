"""Names: which folder of a diffusers model is which layer of Cake, and what kind of component it is. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from cake_core.checkpoint import Checkpoint
from cake_core.errors import CheckpointError, UnsupportedModel
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.model import Layer, LoadOptions, ModelInfo

Kind = Literal["text", "denoiser", "vae"]

FOLDERS: Mapping[str, str] = {
    "clip": "text_encoder",
    "clip2": "text_encoder_2",
    "clip3": "text_encoder_3",
    "unet": "unet",
    "transformer": "transformer",
    "vae": "vae",
}
"""Layer -> folder of the diffusers model, in the order of execution."""

KINDS: Mapping[str, Kind] = {
    "clip": "text", "clip2": "text", "clip3": "text", "unet": "denoiser", "transformer": "denoiser", "vae": "vae",
}  # fmt: skip

ELEMENT_SIZE = {"f32": 4, "f16": 2, "bf16": 2}


def pipeline_class(checkpoint: Checkpoint) -> str:
    """Name of the diffusers pipeline that the model index asks for."""
    return str(checkpoint.config.get("_class_name", ""))


def layers_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Layers that the model index lists, whether their weights are on this machine or not."""
    return tuple(layer for layer, folder in FOLDERS.items() if component_class(checkpoint, folder) is not None)


def component_class(checkpoint: Checkpoint, folder: str) -> tuple[str, str] | None:
    """(library, class) of a component in the model index; None where it has none."""
    entry = checkpoint.config.get(folder)
    if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
        return entry[0], entry[1]
    return None


def guess_dtype(options: LoadOptions) -> str:
    """The dtype that `auto` will mean on this machine, as well as it can be known without loading torch."""
    if options.dtype != "auto":
        return options.dtype
    from pathlib import Path

    on_gpu = options.device.startswith("cuda") or (options.device == "auto" and Path("/dev/nvidia0").exists())
    return "bf16" if on_gpu else "f32"


def describe(checkpoint: DiffusersCheckpoint, options: LoadOptions, backend: str) -> ModelInfo:
    """Layers and bytes from model_index.json and headers. A component whose weights are elsewhere counts 0 bytes."""
    name = pipeline_class(checkpoint)
    layers = layers_of(checkpoint)
    if not name or "vae" not in layers or not {"unet", "transformer"} & set(layers):
        raise UnsupportedModel(
            f"{checkpoint.path}: {name or 'a model_index.json without _class_name'} has no unet or transformer with a vae; "
            "cake-sd serves diffusers pipelines that denoise latents"
        )
    if "unet" in layers and "transformer" in layers:
        raise UnsupportedModel(f"{checkpoint.path}: {name} has a unet and a transformer; cake-sd serves pipelines with one")
    dtype = guess_dtype(options)
    return ModelInfo(
        backend=backend,
        model_type="image",
        name=checkpoint.name,
        architecture=name,
        layers=tuple(_layer(checkpoint, layer, ELEMENT_SIZE[dtype]) for layer in layers),
        dtype=dtype,
        identity={"pipeline": name, "components": {layer: _class_name(checkpoint, layer) for layer in layers}},
    )


def _class_name(checkpoint: Checkpoint, layer: str) -> str:
    entry = component_class(checkpoint, FOLDERS[layer])
    return entry[1] if entry else ""


def _layer(checkpoint: DiffusersCheckpoint, layer: str, element: int) -> Layer:
    tensors = checkpoint.component_headers(FOLDERS[layer])
    elements = 0
    for tensor in tensors.values():
        count = 1
        for n in tensor.shape:
            count *= n
        elements += count
    file_nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return Layer(layer, elements * element, tuple(tensors), file_nbytes, stateless=True)


def component_config(checkpoint: DiffusersCheckpoint, layer: str) -> Mapping[str, Any]:
    """config.json of a layer's component. Raises CheckpointError when the folder lacks it."""
    config = checkpoint.component_config(FOLDERS[layer])
    if config is None:
        raise CheckpointError(
            f"{checkpoint.path / FOLDERS[layer]} has no config.json; copy it from the model's repository (it is small)"
        )
    return config
