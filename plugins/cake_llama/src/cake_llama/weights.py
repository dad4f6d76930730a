"""Where weights come from, and the names they have there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch

from cake_core.checkpoint import Checkpoint, TensorInfo
from cake_core.errors import CheckpointError, UnsupportedModel
from cake_llama.hf_quant import scheme_of
from cake_llama.packed import PLAIN, Packed, stored
from cake_llama.random_model import RandomCheckpoint
from cake_llama.wire import bytes_of

CPU = torch.device("cpu")

TORCH_DTYPES: Mapping[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

_FILE_DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
}  # fmt: skip
_PIECE = 16 * 1024 * 1024
"""Bytes converted at a time, so that a load needs little beside the weights themselves."""


class WeightSource(Protocol):
    """Tensors by their Hugging Face names."""

    def names(self) -> tuple[str, ...]: ...

    def load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor, on the CPU unless it is made elsewhere. Raises CheckpointError when it is missing or cannot be read."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def kind(self, name: str) -> str:
        """What `rows` gives of a matrix: F32, F16, BF16, a GGUF type, G4, G8 or F8. Reads no weights."""

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Packed:
        """Rows start .. stop - 1 of a matrix at the width of the file, on the CPU."""


def weight_source(checkpoint: Checkpoint, device: torch.device = CPU) -> WeightSource:
    """`device` matters to random weights alone, which are made where they will be."""
    if isinstance(checkpoint, RandomCheckpoint):
        return checkpoint.source(device)
    if checkpoint.format == "gguf":
        from cake_llama.gguf_weights import GgufWeights

        return GgufWeights(checkpoint)
    scheme = scheme_of(checkpoint)
    if scheme is None:
        return SafetensorsWeights(checkpoint)
    from cake_llama.config import ModelConfig
    from cake_llama.hf_weights import QuantizedWeights
    from cake_llama.names import layer_tensors

    layers = layer_tensors(checkpoint, ModelConfig.from_checkpoint(checkpoint)).values()
    return QuantizedWeights(checkpoint, {weight.name: weight for layer in layers for weight in layer}, scheme)


class SafetensorsWeights:
    """Reads straight into the tensor it returns: a mapped file would count twice in the process' memory while it is copied."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._path = checkpoint.path
        self._tensors = checkpoint.tensors

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[0].shape

    def kind(self, name: str) -> str:
        kept = self._find(name)[1]
        return PLAIN[kept if kept in PLAIN else torch.float32]

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Packed:
        info, kept = self._find(name)
        first, *rest = info.shape
        count = (first if stop is None else stop) - start
        result = torch.empty((count, *rest), dtype=kept)
        self._checkpoint.read_into(info, start * math.prod(rest) * kept.itemsize, bytes_of(result))
        return stored(result if kept in PLAIN else result.to(torch.float32))

    def _find(self, name: str) -> tuple[TensorInfo, torch.dtype]:
        info = self._tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self._path} has no tensor {name}; download it again")
        kept = _FILE_DTYPES.get(info.dtype)
        if kept is None:
            raise UnsupportedModel(f"{self._path}: tensor {name} is of type {info.dtype}; served are {', '.join(_FILE_DTYPES)}")
        return info, kept

    def load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        info, kept = self._find(name)
        result = torch.empty(info.shape, dtype=dtype)
        flat = result.view(-1)
        step = flat.numel() if kept is dtype else _PIECE // kept.itemsize
        for start in range(0, flat.numel(), max(1, step)):
            piece = flat[start : start + step]
            if kept is dtype:
                self._checkpoint.read_into(info, start * kept.itemsize, bytes_of(piece))
            else:
                raw = torch.empty(piece.numel(), dtype=kept)
                self._checkpoint.read_into(info, start * kept.itemsize, bytes_of(raw))
                piece.copy_(raw)
        return result
