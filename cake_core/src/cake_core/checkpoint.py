"""A model on disk, opened without loading it: configuration, tensor headers, files.

A checkpoint is a folder of safetensors (single file or index), a GGUF file (several parts too), or a diffusers folder
(a `model_index.json` with a safetensors folder a component, whose tensors are named `component/tensor`).
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cake_core.errors import CheckpointError
from cake_core.filenames import is_file_name


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint: `nbytes` at `offset` of `file`. `dtype` is the file format's own name for it
    (`BF16`, `Q4_K`); `shape` is outermost dimension first for every format."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


ABSENT = "absent.json"
"""In a bundle: the tensors of the model that it does not hold, name -> [dtype, shape, bytes]."""


Await = Callable[[Path, int, int], None]
"""`wait(file, start, stop)` returns when these bytes of a file are there, and raises what keeps them from coming."""


class Checkpoint(ABC):
    """A model on this machine. Opening reads headers only."""

    format: str
    """`safetensors`, `gguf` or `diffusers`."""

    wait: Await | None = None
    """While its files are still being filled: only the headers are sure to be there."""

    def __init__(self, path: Path, name: str = "") -> None:
        self.path = path
        self.name = name or (path.name if path.is_dir() else path.stem)

    @property
    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """config.json, the GGUF metadata, or model_index.json."""

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, from headers."""

    @cached_property
    def headers(self) -> Mapping[str, TensorInfo]:
        """`tensors`, and in a bundle of split-model those that were left out too (their `file` is the list in the bundle,
        their bytes are elsewhere). `Backend.describe` reads these, so that a bundle is described as the whole model is."""
        path = (self.path if self.path.is_dir() else self.path.parent) / ABSENT
        return {**_absent(path), **self.tensors} if path.is_file() else self.tensors

    def json(self, name: str) -> Mapping[str, Any] | None:
        """A JSON file beside the weights, None where there is none. Raises CheckpointError when it is not an object."""
        path = self.path / name if self.path.is_dir() else self.path.parent / name
        return read_json(path) if path.is_file() else None

    def read_into(self, tensor: TensorInfo, start: int, into: memoryview) -> None:
        """Fills `into` with the bytes of a tensor from byte `start` on, and waits for those that are still on their way.

        Raises CheckpointError when the file cannot be read or ends early, and whatever ended the transfer of its bytes.
        """
        if self.wait is not None:
            self.wait(tensor.file, tensor.offset + start, tensor.offset + start + len(into))
        try:
            with tensor.file.open("rb", buffering=0) as file:
                file.seek(tensor.offset + start)
                while into:
                    count = file.readinto(into)
                    if not count:
                        raise CheckpointError(f"{tensor.file} ends within {tensor.name}; download it again")
                    into = into[count:]
        except OSError as error:
            raise CheckpointError(f"cannot read {tensor.file}: {error.strerror}; check that the file is still there") from error

    def fingerprint(self, names: Iterable[str]) -> str:
        """A hash over name, dtype, shape and a sample of the bytes of each tensor: equal on two machines when they hold
        the same tensors, different for two fine-tunes of one base. Independent of how tensors are spread over files."""
        digest = hashlib.sha256()
        for name in sorted(names):
            tensor = self.tensors[name]
            if self.wait is not None:
                self.wait(tensor.file, tensor.offset, tensor.offset + tensor.nbytes)
            digest.update(f"{name}|{tensor.dtype}|{tensor.shape}|{tensor.nbytes}".encode())
            digest.update(sample_bytes(tensor))
        return digest.hexdigest()


SAMPLES = 8
SAMPLE_BYTES = 512


def sample_bytes(tensor: TensorInfo) -> bytes:
    """SAMPLES pieces of SAMPLE_BYTES spread evenly over a tensor, or all of a small one."""
    if tensor.nbytes <= SAMPLES * SAMPLE_BYTES:
        pieces = [(0, tensor.nbytes)]
    else:
        stride = (tensor.nbytes - SAMPLE_BYTES) // (SAMPLES - 1)
        pieces = [(i * stride, SAMPLE_BYTES) for i in range(SAMPLES)]
    try:
        with tensor.file.open("rb") as file:
            found = []
            for start, length in pieces:
                file.seek(tensor.offset + start)
                found.append(file.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot read {tensor.file}: {error.strerror}; check that the file is still there") from error
    return b"".join(found)


def read_json(path: Path) -> Mapping[str, Any]:
    """Raises CheckpointError, naming the file, when it cannot be read or is not a JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; download it again")
    return value


def indexed_files(index: Path) -> list[Path]:
    """The files that an index of shards lists, all of them beside it.

    Raises CheckpointError, naming the index, when it lists none, what is no file of its folder, or what is not there.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no usable weight_map; download it again")
    names = sorted(set(weight_map.values()))
    if strange := [name for name in names if not is_file_name(name)]:
        raise CheckpointError(f"{index} lists {strange[0]!a:.100}, which cannot be a file beside it; do not trust this model")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index.parent} lacks {', '.join(missing[:3])} of its index; `cake pull` resumes a download")
    return [index.parent / name for name in names]


def _absent(path: Path) -> dict[str, TensorInfo]:
    try:
        return {
            name: TensorInfo(name, dtype, tuple(shape), path, 0, nbytes)
            for name, (dtype, shape, nbytes) in read_json(path).items()
        }
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged; split the model again") from error


class SafetensorsCheckpoint(Checkpoint):
    """A Hugging Face folder (config.json beside `*.safetensors`) or a single `.safetensors` file with its config beside it."""

    format = "safetensors"

    @cached_property
    def config(self) -> Mapping[str, Any]:
        config = self.json("config.json")
        if config is None:
            raise CheckpointError(f"{self.path} has no config.json; copy it from the model's repository")
        return config

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        from cake_core.formats.safetensors import read_headers

        return read_headers(self._files())

    def _files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            return indexed_files(index)
        files = sorted(self.path.glob("*.safetensors"))
        if not files and not (self.path / ABSENT).is_file():
            raise CheckpointError(f"{self.path} has no *.safetensors file; `cake pull` downloads a model")
        return files
