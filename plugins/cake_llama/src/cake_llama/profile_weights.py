"""Checkpoints for measuring: weights of a shape that are quick to make, at every width."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from cake_llama.narrow import quantized
from cake_llama.packed import Blocks, Groups, Packed, stored
from cake_llama.random_model import RandomCheckpoint, RandomWeights, llama_shape

ROWS = 256
"""Rows that are narrowed, and repeated to make a matrix."""
KINDS = {"bf16": "BF16", "int8": "Q8_0", "int4": "G4"}


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of what is measured. `chunk`: prompt positions a batch."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    chunk: int = 128

    @property
    def config(self) -> dict[str, Any]:
        return llama_shape(self.hidden, self.inner, self.layers, self.heads, self.kv_heads, 512, torch_dtype="bfloat16")


class ProfileCheckpoint(RandomCheckpoint):
    """Weights that are quick to make: one random matrix of each width, copied for every tensor."""

    def __init__(self, size: Size, kind: str) -> None:
        super().__init__(f"profile-{size.hidden}-{kind}", size.config)
        self.kind = kind

    def source(self, device: torch.device) -> RandomWeights:
        return CopiedWeights(self, device)


class CopiedWeights(RandomWeights):
    def __init__(self, checkpoint: ProfileCheckpoint, device: torch.device) -> None:
        super().__init__(checkpoint, device)
        self._kind = checkpoint.kind
        self._pools: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self._narrow: dict[int, Packed] = {}

    def load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        shape = self.shape(name)
        if len(shape) == 1:
            return super().load(name, dtype)
        return self._pool(shape[1], dtype)[: shape[0]].clone()

    def kind(self, name: str) -> str:
        return KINDS[self._kind] if len(self.shape(name)) == 2 else super().kind(name)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Packed:
        count, wide = self.shape(name)
        stop = count if stop is None else stop
        if self._kind == "bf16":
            return stored(self._pool(wide, torch.bfloat16)[start:stop].clone())
        if wide not in self._narrow:
            high = max(shape[0] for shape in map(self.shape, self.names()) if len(shape) == 2 and shape[1] == wide)
            self._narrow[wide] = _repeated(quantized(self._pool(wide, torch.float32)[:ROWS], self._kind), -(-high // ROWS))
        return self._narrow[wide].rows(start, stop)

    def _pool(self, wide: int, dtype: torch.dtype) -> torch.Tensor:
        if (wide, dtype) not in self._pools:
            high = max(shape[0] for shape in map(self.shape, self.names()) if len(shape) == 2 and shape[1] == wide)
            generator = torch.Generator(self._device).manual_seed(wide)
            made = torch.empty((high, wide), dtype=dtype, device=self._device)
            self._pools[wide, dtype] = made.normal_(0.0, wide**-0.5, generator=generator)
        return self._pools[wide, dtype]


def _repeated(rows: Packed, times: int) -> Packed:
    """Narrowing is slow, and what the numbers are does not matter."""
    match rows:
        case Blocks(kind, (high, wide), data):
            return Blocks(kind, (high * times, wide), data.repeat(times, 1))
        case Groups():
            codes, scales, zeros = (part.repeat(times, 1) for part in (rows.codes, rows.scales, rows.zeros))
            return replace(rows, codes=codes, scales=scales, zeros=zeros)
    raise TypeError(f"no narrow weights of {type(rows).__name__}")
