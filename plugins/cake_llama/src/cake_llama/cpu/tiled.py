"""Products of packed weights with PyTorch alone: a tile at a time is dequantised and multiplied in f32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from cake_llama.packed import Packed

TILE_VALUES = 1 << 20
"""Values dequantised at a time: little beside the weights, and few enough to be still in the cache when they are multiplied."""


@dataclass(frozen=True, slots=True)
class TiledLinear:
    """One or several projections of the same input, their outputs side by side."""

    parts: tuple[Packed, ...]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> f32 [T, out]"""
        x = x.to(torch.float32)
        out = torch.cat([piece for part in self.parts for piece in _products(part, x)], -1)
        return out if self.bias is None else out + self.bias


def _products(part: Packed, x: Tensor) -> list[Tensor]:
    count, cols = part.shape
    step = max(1, TILE_VALUES // cols)
    x = x if part.order is None else x[:, part.order]
    return [linear(x, part.rows(start, min(start + step, count)).dequantized()) for start in range(0, count, step)]


@dataclass(frozen=True, slots=True)
class TiledEmbedding:
    table: Packed

    def __getitem__(self, tokens: Tensor) -> Tensor:
        """i64 [T] -> f32 [T, hidden_size]"""
        return torch.cat([self.table.rows(token, token + 1).dequantized() for token in tokens.tolist()])
