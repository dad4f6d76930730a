"""GGUF models: one file, or several parts of one (`model-00001-of-00003.gguf`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from cake_core.checkpoint import Checkpoint, TensorInfo
from cake_core.errors import CheckpointError
from cake_core.formats.gguf_header import GgufFile, read_gguf

_PART = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")


def part_number(path: PurePath) -> int:
    """3 for `model-00003-of-00005.gguf`, 1 for a file that is alone."""
    match = _PART.match(path.name)
    return int(match[2]) if match else 1


def part_files(path: Path) -> list[Path]:
    """All parts of `model-00001-of-00003.gguf` in order, whichever was named; any other file alone.

    Raises CheckpointError, naming them, when parts are missing.
    """
    match = _PART.match(path.name)
    if match is None:
        return [path]
    parts = [path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") for number in range(1, int(match[3]) + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(f"{path.parent} lacks {', '.join(missing[:3])}; all {match[3].lstrip('0')} parts belong together")
    return parts


class GgufCheckpoint(Checkpoint):
    """A GGUF file, or several parts of one; `config` is the metadata of the first."""

    format = "gguf"

    def __init__(self, path: Path, name: str = "") -> None:
        match = _PART.match(path.name)
        super().__init__(path, name or (match[1] if match else ""))

    @cached_property
    def files(self) -> tuple[GgufFile, ...]:
        return tuple(read_gguf(part) for part in part_files(self.path))

    @property
    def config(self) -> Mapping[str, Any]:
        return self.files[0].metadata

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            for name, tensor in file.tensors.items():
                if name in tensors:
                    raise CheckpointError(f"tensor {name} is in {tensors[name].file.name} and in {file.path.name}")
                tensors[name] = tensor
        expected = self.config.get("split.tensors.count")
        if len(self.files) > 1 and isinstance(expected, int) and expected != len(tensors):
            raise CheckpointError(f"the parts of {self.path} hold {len(tensors)} tensors, not {expected}; download them again")
        return tensors

    def json(self, name: str) -> Mapping[str, Any] | None:
        """None: a GGUF file brings everything with it, and what lies beside it may belong to another model."""
        return None
