"""Diffusers folders: a `model_index.json` and a folder a component, tensors named `component/tensor`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from cake_core.checkpoint import ABSENT, Checkpoint, TensorInfo, indexed_files, read_json
from cake_core.errors import CheckpointError
from cake_core.filenames import is_file_name
from cake_core.formats.safetensors import read_header

MODEL_INDEX = "model_index.json"
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_FILE = re.compile(r"^(?P<stem>[^.]+?)(-\d{5}-of-\d{5})?(\.(?P<variant>[\w-]+?))?(-\d{5}-of-\d{5})?\.safetensors$")


class DiffusersCheckpoint(Checkpoint):
    """A diffusers folder; `config` is its model_index.json.

    A component that comes in several variants is read in `variant` when it has that one, else at full precision, else in
    fp16, else in the first there is. `variant=""` is full precision.
    """

    format = "diffusers"

    def __init__(self, path: Path, name: str = "", variant: str | None = None) -> None:
        super().__init__(path, name or path.name)
        self.variant = variant

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return read_json(self.path / MODEL_INDEX)

    @property
    def components(self) -> tuple[str, ...]:
        """Folders of the model index that hold weights, in its order."""
        return tuple(name for name in self.config if self.component_files(name))

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for component in self.components:
            for file in self.component_files(component):
                for name, info in read_header(file).items():
                    full = f"{component}/{name}"
                    if full in tensors:
                        raise CheckpointError(f"tensor {name} is in two files of {self.path / component}; remove one of them")
                    tensors[full] = TensorInfo(full, info.dtype, info.shape, info.file, info.offset, info.nbytes)
        if not tensors and not (self.path / ABSENT).is_file():
            raise CheckpointError(f"{self.path} has no safetensors weights; `cake pull` downloads a model")
        return tensors

    def component_headers(self, component: str) -> Mapping[str, TensorInfo]:
        """Tensors of one component by their headers, which a bundle has of all; empty in a folder without any weights."""
        if not self.components and not (self.path / ABSENT).is_file():
            return {}
        return {name: info for name, info in self.headers.items() if name.startswith(f"{component}/")}

    def component_config(self, component: str) -> Mapping[str, Any] | None:
        """The config.json of one component, None where it has none."""
        path = self._folder(component) / "config.json"
        return read_json(path) if path.is_file() else None

    def component_files(self, component: str) -> list[Path]:
        """Weight files of one component, in the chosen variant; empty where it has no safetensors.

        Raises CheckpointError when an index names a file that is not there, or the component is no name of a folder.
        """
        folder = self._folder(component)
        if not folder.is_dir():
            return []
        variants = _variants(folder)
        wished = [self.variant] if self.variant is not None else []
        for variant in (*wished, "", "fp16", *sorted(variants)):
            if variant in variants:
                return _indexed(folder, variant, variants[variant])
        return []

    def _folder(self, component: str) -> Path:
        if not is_file_name(component):
            index = self.path / MODEL_INDEX
            raise CheckpointError(
                f"{index} lists {component!a:.100}, which cannot be a folder beside it; do not trust this model"
            )
        return self.path / component


def _variants(folder: Path) -> dict[str, list[Path]]:
    """Weight files by variant, of the first stem that has any."""
    found: dict[str, dict[str, list[Path]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if match := _FILE.match(file.name):
            found.setdefault(match["stem"], {}).setdefault(match["variant"] or "", []).append(file)
    for stem in (*_STEMS, *found):
        if stem in found:
            return found[stem]
    return {}


def _indexed(folder: Path, variant: str, files: list[Path]) -> list[Path]:
    """The files that the variant's index lists, if it has one: leftovers of other shardings are not read."""
    suffix = f".{variant}.json" if variant else ".json"
    for index in sorted(folder.glob(f"*.safetensors.index{suffix}")):
        return indexed_files(index)
    return files
