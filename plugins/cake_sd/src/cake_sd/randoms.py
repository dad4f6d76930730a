"""Models of real size with random weights, `random:xl`: to measure a machine or a cluster without downloading anything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cake_core.checkpoint import ABSENT, TensorInfo
from cake_core.formats.diffusers import MODEL_INDEX, DiffusersCheckpoint
from cake_sd.shapes import END, SHAPES, START, model_files, write_files, write_tokenizer
from cake_sd.versions import RANDOM

MARK = "random.json"
"""In a model folder: its components have no files and are made up when they are loaded."""


class RandomCheckpoint(DiffusersCheckpoint):
    """Has headers, from the list of its absent tensors, and no tensor that could be read or compared."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {}


def resolve(reference: str, cache: Path) -> RandomCheckpoint | None:
    """The model of a `random:NAME`, its folder of configurations made in `cache` at first use; None for other references."""
    name = reference.removeprefix(RANDOM)
    if name not in SHAPES:
        return None
    folder = cache / "random" / name
    if not (folder / MARK).is_file():
        _make(name, folder)
    return RandomCheckpoint(folder, reference)


def _make(name: str, folder: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())  # a tokenizer that knows single bytes only
    vocab = {token: number for number, token in enumerate((*letters, *(f"{letter}</w>" for letter in letters), START, END))}
    files = model_files(name)
    for path, config in files.items():
        if path.startswith("text_encoder"):
            config |= {"bos_token_id": vocab[START], "eos_token_id": vocab[END], "pad_token_id": vocab[END]}
    write_files(folder, files)
    for part in [part for part in files[MODEL_INDEX] if part.startswith("tokenizer")]:
        write_tokenizer(folder / part, vocab, "#version: 0.2\n", END)
    write_files(folder, {ABSENT: _headers(DiffusersCheckpoint(folder)), MARK: {"name": name}})


def _headers(checkpoint: DiffusersCheckpoint) -> dict[str, Any]:
    """Names and shapes of the tensors that the components will have, as a bundle lists those it lacks."""
    from accelerate import init_empty_weights

    from cake_sd.layout import FOLDERS, layers_of

    found: dict[str, Any] = {}
    for layer in layers_of(checkpoint):
        with init_empty_weights():
            module = build(checkpoint, layer)
        for name, value in module.state_dict().items():
            found[f"{FOLDERS[layer]}/{name}"] = ["F16", list(value.shape), 2 * value.numel()]
    return found


def build(checkpoint: DiffusersCheckpoint, layer: str) -> Any:
    """A component with whatever weights its constructor gives it, on torch's current default device."""
    from cake_sd.layout import component_config
    from cake_sd.loading import resolve_class

    real, config = resolve_class(checkpoint, layer), dict(component_config(checkpoint, layer))
    if getattr(real, "config_class", None) is not None:
        return real(real.config_class.from_dict(config))
    return real.from_config(config)
