"""A quantised copy of a checkpoint: what `split-model --quantize` cuts up.

It is written as compressed-tensors writes pack-quantized models, in groups of 32 columns: a published layout that other
programs read too, that says group, scale and zero in so many words, and whose 4 bit may be asymmetric, which no GGUF type with
a plain scale and zero is. Values are those of `--quantize` at load.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cake_core.bundle import side_files
from cake_core.checkpoint import Checkpoint, SafetensorsCheckpoint
from cake_core.errors import ConfigError
from cake_core.model import Progress
from cake_llama.config import ModelConfig
from cake_llama.hf_quant import scheme_of
from cake_llama.names import EMBED, HEAD, layer_tensors
from cake_llama.narrow import GROUP, NarrowedWeights
from cake_llama.packed import Blocks, Groups, Packed, grouped, nibbles
from cake_llama.weights import weight_source

INDEX = "model.safetensors.index.json"


def write_narrowed(checkpoint: Checkpoint, quantize: str, folder: Path, progress: Progress | None) -> Checkpoint:
    """Writes a folder with one file a layer; memory holds one layer at a time. Raises ConfigError for one that is quantised."""
    if checkpoint.format != "safetensors" or scheme_of(checkpoint) is not None:
        raise ConfigError(f"{checkpoint.name} is quantised already, its weights stay as they are; leave --quantize out")
    layers = layer_tensors(checkpoint, ModelConfig.from_checkpoint(checkpoint))
    source = NarrowedWeights(weight_source(checkpoint), quantize)
    beside = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    for name, image in side_files(beside).items():
        image.write(folder / name, lambda _: None)
    config = {**checkpoint.config, "quantization_config": _quantization(quantize)}
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    weight_map, total, done = dict[str, str](), sum(w.nbytes for layer in layers.values() for w in layer), 0
    for layer, weights in layers.items():
        tensors: dict[str, Tensor] = {}
        for weight in weights:
            if weight.name not in weight_map and f"{weight.name}_packed" not in weight_map:  # else tied
                tensors |= _written(source, weight.name, weight.shape)
                done += weight.nbytes
        weight_map |= dict.fromkeys(tensors, f"{layer}.safetensors")
        if tensors:
            save_file(tensors, folder / f"{layer}.safetensors", {"format": "pt"})
        if progress is not None:
            progress(done, total)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8")
    return SafetensorsCheckpoint(folder, checkpoint.name)


def _written(source: NarrowedWeights, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    if len(shape) == 2 and source.kind(name) in ("Q8_0", "G4"):
        return {f"{name}_{part}": tensor for part, tensor in packed_parts(source.rows(name)).items()}
    kept = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return {name: source.load(name, kept[source.kind(name)])}


def packed_parts(matrix: Packed) -> dict[str, Tensor]:
    """The tensors of a matrix of groups, as pack-quantized has them."""
    groups = grouped(matrix) if isinstance(matrix, Blocks) else matrix
    if not isinstance(groups, Groups):
        raise TypeError(f"{groups.kind} has no groups")
    bits = 4 if groups.kind == "G4" else 8
    codes = nibbles(groups.codes) if bits == 4 else groups.codes
    parts = {"packed": _words(codes, bits), "scale": groups.scales.contiguous(), "shape": torch.tensor(groups.shape)}
    if bool((groups.zeros != 1 << (bits - 1)).any()):
        parts["zero_point"] = _words(groups.zeros.T, bits).T.contiguous()
    return parts


def _words(codes: Tensor, bits: int) -> Tensor:
    """u8 [rows, cols] -> i32, the first of a word in its lowest bits; filled up with zeros."""
    each = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each))
    if bits == 4:
        padded = padded[:, 0::2] | (padded[:, 1::2] << 4)
    return padded.contiguous().view(torch.int32)


def _quantization(quantize: str) -> dict[str, Any]:
    def group(bits: int, targets: list[str]) -> dict[str, Any]:
        weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": bits == 8}
        return {"targets": targets, "weights": weights, "input_activations": None}

    groups = {"group_0": group(8, [f"re:{EMBED}", f"re:{HEAD}"]), "group_1": group(8 if quantize == "int8" else 4, ["Linear"])}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "ignore": []}
