"""Weights of a GGUF file by their Hugging Face names, as torch tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from cake_core.errors import CheckpointError, UnsupportedModel
from cake_core.formats.gguf_header import TYPES
from cake_llama.dequant import SERVED, dequantize
from cake_llama.gguf_names import hf_name
from cake_llama.packed import Blocks

if TYPE_CHECKING:
    from cake_core.checkpoint import Checkpoint, TensorInfo
    from cake_llama.packed import Packed

CHUNK_VALUES = 1 << 22
"""Values dequantised at a time: what a load needs beside the weights themselves stays below 64 MB."""

_ROPE_TABLES = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Tensors that are configuration: `gguf_config` reads them."""

_VALUES_A_BLOCK = {name: (values, nbytes) for name, values, nbytes in TYPES.values()}


class GgufWeights:
    """Loads one tensor at a time, dequantised, in the layout of the Hugging Face weights."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._architecture = str(checkpoint.config.get("general.architecture"))

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Tensors by Hugging Face name. Raises UnsupportedModel for one that the model has no place for, or of a type that is
        not served."""
        found: dict[str, TensorInfo] = {}
        for name, tensor in self._checkpoint.tensors.items():
            if name in _ROPE_TABLES:
                continue
            known = hf_name(name, self._architecture)
            if known is None:
                raise UnsupportedModel(
                    f"{self._checkpoint.path} has a tensor {name!r}, which {self._architecture} models do not"
                )
            if tensor.dtype not in SERVED:
                raise UnsupportedModel(
                    f"{self._checkpoint.path}: tensor {name!r} is of type {tensor.dtype} (served: {', '.join(SERVED)}); "
                    "use a file of another quantisation, e.g. Q4_K_M"
                )
            found[known] = tensor
        return found

    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def _find(self, name: str) -> TensorInfo:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self._checkpoint.path} has no {name}; download it again")
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def kind(self, name: str) -> str:
        return self._find(name).dtype

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Packed:
        """Rows of a matrix as blocks, in the order of the Hugging Face weights."""
        tensor = self._find(name)
        count, cols = tensor.shape
        stop = count if stop is None else stop
        width = tensor.nbytes // count
        heads = self._interleaved_heads(name)
        if heads is None:
            data = torch.from_numpy(self._read(tensor, start * width, (stop - start) * width))
            return Blocks(tensor.dtype, (stop - start, cols), data.view(-1, width))
        whole = torch.from_numpy(self._read(tensor, 0, tensor.nbytes)).view(count, width)
        return Blocks(tensor.dtype, (stop - start, cols), _separate_halves(whole, heads)[start:stop].contiguous())

    def load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One weight on the CPU. Raises CheckpointError when it is missing or the file cannot be read."""
        tensor = self._find(name)
        result = torch.empty(tensor.shape, dtype=dtype)
        flat = result.view(-1)
        values, nbytes = _VALUES_A_BLOCK[tensor.dtype]
        step = CHUNK_VALUES // values
        for start in range(0, tensor.nbytes // nbytes, step):
            data = self._read(tensor, start * nbytes, min(step * nbytes, tensor.nbytes - start * nbytes))
            chunk = torch.from_numpy(dequantize(tensor.dtype, data))
            flat[start * values : start * values + len(chunk)] = chunk
        heads = self._interleaved_heads(name)
        return result if heads is None else _separate_halves(result, heads)

    def _read(self, tensor: TensorInfo, start: int, nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        data = np.empty(nbytes, np.uint8)
        self._checkpoint.read_into(tensor, start, data.data)
        return data

    def _interleaved_heads(self, name: str) -> int | None:
        """Heads of a projection whose rows llama files hold pairwise (x0 y0 x1 y1 …), for rotation in pairs."""
        if self._architecture != "llama" or ".self_attn." not in name:
            return None
        heads = self._checkpoint.config["llama.attention.head_count"]
        if ".q_proj." in name:
            return int(heads)
        return int(self._checkpoint.config.get("llama.attention.head_count_kv", heads)) if ".k_proj." in name else None


def _separate_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads * (pairs, 2), ...] -> [heads * (2, pairs), ...]: halves side by side, as the model rotates them."""
    return rows.view(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
