"""The files of a part of a model: some tensors at their own width, configuration, tokenizer, and `absent.json`, the headers of
the model's other tensors. Together they are a checkpoint that opens as any other and is described as the whole model is.

split-model writes them to a folder; a master hands them to workers that have none of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from cake_core.checkpoint import ABSENT, Checkpoint, TensorInfo
from cake_core.errors import CheckpointError
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.formats.gguf import GgufCheckpoint
from cake_core.formats.subset import Image, gguf_image, safetensors_image
from cake_core.model import ModelInfo

REDUCED = "reduced"
INDEX = "model.safetensors.index.json"
SMALL = 1 << 20
"""Tensors that no layer claims (tables of frequencies) go along when they are at most this long, in bytes."""

_SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_SIDE_LIMIT = 64 << 20

Files = dict[str, Image]
"""Path inside the folder, with `/`, to what the file holds."""


def tensors_of(checkpoint: Checkpoint, model: ModelInfo, layers: Sequence[str]) -> dict[str, TensorInfo]:
    """The tensors that these layers need, and the small ones that nobody claims. Raises CheckpointError for missing ones."""
    claimed = {name for layer in model.layers for name in layer.tensors}
    wanted = {name for layer in layers for name in model.layer(layer).tensors}
    tensors = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if name in wanted
        or (name not in claimed and tensor.nbytes <= SMALL and not isinstance(checkpoint, DiffusersCheckpoint))
    }
    if missing := sorted(wanted - tensors.keys()):
        raise CheckpointError(f"{checkpoint.path} lacks {', '.join(missing[:3])}; is it itself a bundle? take the whole model")
    return tensors


def bundle_files(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo]) -> Files:
    """What split-model writes: the weights in one file, where the format has one for the whole model."""
    absent = {name: info for name, info in checkpoint.headers.items() if name not in tensors}
    return {ABSENT: _absent(absent), **_files(checkpoint, tensors, [list(tensors)])}


def layer_files(checkpoint: Checkpoint, model: ModelInfo, layers: Sequence[str]) -> Files:
    """The same with a file for each layer, so that who gets other layers later can keep those that it has.

    A file's content depends on the model and its own layers alone, not on which others go along.
    """
    tensors = tensors_of(checkpoint, model, layers)
    owners: dict[str, tuple[str, ...]] = dict.fromkeys(tensors, ())
    for layer in model.layers:
        for name in layer.tensors:
            if name in owners:
                owners[name] = (*owners[name], layer.name)
    # Tied weights belong to two layers; in a file of their own they are in no other file twice. Files come in the order in
    # which layers are loaded, and first what belongs to none: a worker loads while the rest is on its way.
    place = {layer.name: index for index, layer in enumerate(model.layers)}
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, owner in sorted(owners.items(), key=lambda held: [place[layer] for layer in held[1]]):
        groups.setdefault(owner, []).append(name)
    return {ABSENT: _absent(checkpoint.headers), **_files(checkpoint, tensors, list(groups.values()))}


def _files(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], groups: Sequence[Sequence[str]]) -> Files:
    if isinstance(checkpoint, GgufCheckpoint):
        return _gguf_files(checkpoint, groups)
    if isinstance(checkpoint, DiffusersCheckpoint):
        return _diffusers_files(checkpoint, tensors)
    weights: Files = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate((names for names in groups if names), 1):
        file = f"{REDUCED}.safetensors" if len(groups) == 1 else f"{REDUCED}-{number:05d}-of-{len(groups):05d}.safetensors"
        weights[file] = safetensors_image({name: tensors[name] for name in names})
        weight_map.update(dict.fromkeys(names, file))
    if weights:
        weights[INDEX] = _index(weight_map, tensors)
    return {**_configuration(checkpoint.path), **weights}


def _gguf_files(checkpoint: GgufCheckpoint, groups: Sequence[Sequence[str]]) -> Files:
    if len(groups) == 1:
        return {f"{REDUCED}.gguf": gguf_image(checkpoint, groups[0])}
    images = [gguf_image(checkpoint, ()), *(gguf_image(checkpoint, names, metadata=False) for names in groups)]
    return {f"{REDUCED}-{number:05d}-of-{len(images):05d}.gguf": image for number, image in enumerate(images, 1)}


def _diffusers_files(checkpoint: DiffusersCheckpoint, tensors: Mapping[str, TensorInfo]) -> Files:
    """The same files in the same folders, weights cut to the tensors; configurations of all components."""
    files = side_files(checkpoint.path)
    for folder in sorted(path for path in checkpoint.path.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files |= {f"{folder.name}/{name}": image for name, image in side_files(folder).items()}
    by_file: dict[Path, dict[str, TensorInfo]] = {}
    for name, tensor in tensors.items():
        by_file.setdefault(tensor.file, {})[name.partition("/")[2]] = tensor
    for file, inside in by_file.items():
        files[f"{file.parent.name}/{file.name}"] = safetensors_image(inside)
    for index in sorted({found for file in by_file for found in file.parent.glob("*.safetensors.index*.json")}):
        listed = {n: f.name for f, inside in by_file.items() if f.parent == index.parent for n in inside}
        held = {name: tensors[f"{index.parent.name}/{name}"] for name in listed}
        files[f"{index.parent.name}/{index.name}"] = _index(listed, held)
    return files


def _configuration(path: Path) -> Files:
    """What lies beside the weights. A single file that needs nothing beside it lies among things that are not its own."""
    if path.is_dir():
        return side_files(path)
    return side_files(path.parent) if (path.parent / "config.json").is_file() else {}


def side_files(folder: Path) -> Files:
    """Configuration, tokenizer and their like; the index is written anew."""
    return {
        file.name: Image((file.read_bytes(),))
        for file in sorted(folder.iterdir())
        if file.is_file()
        and file.suffix in _SIDE_SUFFIXES
        and file.name != ABSENT
        and ".index." not in file.name
        and file.stat().st_size <= _SIDE_LIMIT
    }


def _index(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> Image:
    total = sum(tensors[name].nbytes for name in weight_map)
    return Image((json.dumps({"metadata": {"total_size": total}, "weight_map": dict(weight_map)}, indent=2).encode(),))


def _absent(headers: Mapping[str, TensorInfo]) -> Image:
    return Image((json.dumps({t.name: [t.dtype, t.shape, t.nbytes] for t in headers.values()}).encode(),))
