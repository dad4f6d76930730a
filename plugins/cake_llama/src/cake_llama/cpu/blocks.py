"""Weights at the width of their file, before a device takes them; and what they are in f32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from cake_llama.dequant import dequantize

TILE_VALUES = 1 << 22
"""Values dequantised at a time, so that a product needs little beside its weights."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows of a GGUF type (F32, F16 and BF16 among them), as bytes: `data` u8 [rows, bytes a row]."""

    kind: str
    shape: tuple[int, int]
    data: Tensor

    group: ClassVar[int] = 0
    """Columns a group: these types know their own."""

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def dequantized(self, start: int, stop: int) -> Tensor:
        """f32 [stop - start, cols]"""
        values = dequantize(self.kind, self.data[start:stop].reshape(-1).numpy())
        return torch.from_numpy(values).view(stop - start, self.shape[1])


@dataclass(frozen=True, slots=True)
class Groups:
    """(code - zero) * scale: codes u8 [rows, cols], scales f16 and zeros u8 [rows, groups], `group` columns each."""

    kind: str
    """G4 or G8, by the width that the codes need."""
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.codes.shape
        return rows, cols

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in a file."""
        return self.codes.numel() * (4 if self.kind == "G4" else 8) // 8 + self.scales.nbytes + self.zeros.numel() // 2

    def dequantized(self, start: int, stop: int) -> Tensor:
        """f32 [stop - start, cols]"""
        spread = torch.arange(self.shape[1]) // self.group
        zeros = self.zeros[start:stop].to(torch.float32)[:, spread]
        return (self.codes[start:stop].to(torch.float32) - zeros) * self.scales[start:stop].to(torch.float32)[:, spread]


Rows = Blocks | Groups


PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def stored(weight: Tensor) -> Blocks:
    """A plain tensor [rows, cols] as rows; memory is shared."""
    rows, cols = weight.shape
    return Blocks(PLAIN[weight.dtype], (rows, cols), weight.contiguous().view(torch.uint8).view(rows, -1))


@dataclass(frozen=True, slots=True)
class BlockLinear:
    """Projections of quantised weights with PyTorch alone: a tile at a time is dequantised and multiplied in f32."""

    parts: tuple[Rows, ...]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> f32 [T, out]"""
        x = x.to(torch.float32)
        out = torch.cat([piece for part in self.parts for piece in _products(part, x)], -1)
        return out if self.bias is None else out + self.bias


def _products(rows: Rows, x: Tensor) -> list[Tensor]:
    count, cols = rows.shape
    step = max(1, TILE_VALUES // cols)
    return [linear(x, rows.dequantized(start, min(start + step, count))) for start in range(0, count, step)]


@dataclass(frozen=True, slots=True)
class BlockEmbedding:
    rows: Rows

    def __getitem__(self, tokens: Tensor) -> Tensor:
        """i64 [T] -> f32 [T, hidden_size]"""
        return torch.cat([self.rows.dequantized(token, token + 1) for token in tokens.tolist()])
