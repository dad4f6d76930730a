"""`--quantize`: weights to 8 or 4 bit while they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cake_llama.names import EMBED, HEAD
from cake_llama.packed import Blocks, Groups, Packed, joined, pack_nibbles

if TYPE_CHECKING:
    from cake_llama.weights import WeightSource

GROUP = 32
"""Columns that share a scale, which is also the width of a block of 8-bit activations."""

SHRINKS = tuple(1.0 - 0.02 * step for step in range(16))
"""Ranges tried for 4 bit, as shares of the group's own: a narrower one clips the extremes and rounds all others finer."""


PIECE_VALUES = 1 << 22
"""Values narrowed at a time."""

KINDS = {"int8": "Q8_0", "int4": "G4"}


class NarrowedWeights:
    """A source whose matrices are narrowed, on `device`: the embedding and the head to 8 bit always, the others as `quantize`
    says."""

    def __init__(self, source: WeightSource, quantize: str, device: torch.device | None = None) -> None:
        self._source, self._quantize, self._device = source, quantize, device
        self.names, self.shape, self.load = source.names, source.shape, source.load

    def kind(self, name: str) -> str:
        return KINDS[self._width(name)] if self._narrows(name) else self._source.kind(name)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Packed:
        if not self._narrows(name):
            return self._source.rows(name, start, stop)
        count, cols = self._source.shape(name)
        stop, step, width = count if stop is None else stop, max(1, PIECE_VALUES // cols), self._width(name)
        starts = range(start, stop, step)
        pieces = (self._source.rows(name, at, min(at + step, stop)).dequantized() for at in starts)
        return joined([quantized(piece.to(self._device or piece.device), width) for piece in pieces])

    def _narrows(self, name: str) -> bool:
        shape = self._source.shape(name)
        return len(shape) == 2 and shape[1] % GROUP == 0

    def _width(self, name: str) -> str:
        return "int8" if name.startswith((f"{EMBED}.", f"{HEAD}.")) else self._quantize


def quantized(rows: Tensor, kind: str) -> Blocks | Groups:
    """f32 [rows, cols] (a multiple of GROUP) as `int8` or `int4`."""
    return _int8(rows) if kind == "int8" else _int4(rows)


def _int8(rows: Tensor) -> Blocks:
    """Q8_0: symmetric, one f16 scale a group."""
    count, cols = rows.shape
    grouped = rows.view(count, -1, GROUP)
    scales = (grouped.abs().amax(-1, keepdim=True) / 127).to(torch.float16)
    codes = (grouped / _divisor(scales)).round().clamp(-127, 127).to(torch.int8)
    return Blocks("Q8_0", (count, cols), torch.cat((scales.view(torch.uint8), codes.view(torch.uint8)), -1).view(count, -1))


def _int4(rows: Tensor) -> Groups:
    """(code - zero) * scale with the range of least squared error among SHRINKS; the range always holds 0."""
    count, cols = rows.shape
    grouped = rows.view(count, -1, GROUP)
    low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
    best = torch.full_like(low, torch.inf)
    scales, zeros = torch.zeros_like(low), torch.zeros_like(low)
    for shrink in SHRINKS:
        scale = ((high - low) * (shrink / 15)).to(torch.float16).to(torch.float32)
        zero = (-low * shrink / _divisor(scale)).round().clamp(0, 15)
        codes = (grouped / _divisor(scale) + zero).round().clamp(0, 15)
        error = ((codes - zero) * scale - grouped).square().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    codes = pack_nibbles((grouped / _divisor(scales) + zeros).round().clamp(0, 15).to(torch.uint8).view(count, cols))
    return Groups("G4", codes, scales.view(count, -1).to(torch.float16), zeros.view(count, -1).to(torch.uint8), GROUP)


def _divisor(scales: Tensor) -> Tensor:
    """Scales to divide by: 1 where a group is all zero."""
    wide = scales.to(torch.float32)
    return torch.where(wide == 0, 1.0, wide)
