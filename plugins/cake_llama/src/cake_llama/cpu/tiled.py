"""Products of packed weights with PyTorch alone: a tile at a time is dequantised and multiplied in f32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from cake_llama.packed import Packed

TILE_VALUES = 1 << 18
"""Values dequantised at a time: little beside the weights, and few enough to be still in the cache when they are multiplied."""


@dataclass(frozen=True, slots=True)
class TiledLinear:
    """One or several projections of the same input, their outputs side by side."""

    parts: tuple[Packed, ...]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> f32 [T, out]"""
        x = x.to(torch.float32)
        out = torch.empty((len(x), sum(part.shape[0] for part in self.parts)), dtype=torch.float32)
        at = 0
        for part in self.parts:
            _multiply(part, x, out[:, at : at + part.shape[0]])
            at += part.shape[0]
        return out if self.bias is None else out.add_(self.bias)


def _multiply(part: Packed, x: Tensor, out: Tensor) -> None:
    count, cols = part.shape
    step = max(1, TILE_VALUES // cols)
    x = x if part.order is None else x[:, part.order]
    for start in range(0, count, step):
        stop = min(start + step, count)
        out[:, start:stop] = linear(x, part.rows(start, stop).dequantized())


@dataclass(frozen=True, slots=True)
class TiledEmbedding:
    table: Packed

    def __getitem__(self, tokens: Tensor) -> Tensor:
        """i64 [T] -> f32 [T, hidden_size]"""
        return torch.cat([self.table.rows(token, token + 1).dequantized() for token in tokens.tolist()])
