"""Weights of 4, 5, 6 and 8 bits as devices other than the CPU keep them: one form for all formats, near the width of the file.

A row is groups of 32 columns. A group has
- `codes`, i32 words: column w * plane + j is in word j, at bit w * plane, where w is 4 for up to 6 bits and 8 for 8;
- `high`, of 5 and 6 bits: their upper one or two bits, column c at bit c of one word, or at 2 * (c % 16) of word c // 16;
- `scales`, one word with two f16, the first one low. Either weight = code * first + second, or, symmetric,
  weight = (code - 2^(bits - 1)) * scale, the first for the first 16 columns and the second for the others.

Scales are rounded to f16, relative 2^-11, where the file has products of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

GROUP = 32
TILE_VALUES = 1 << 24
"""Values dequantised at a time, so that a product needs little beside its weights, and finds them in a GPU's cache."""


@dataclass(frozen=True, slots=True)
class Coded:
    """Codes u8 [rows, cols] of `bits`; scales [rows, cols / 16] where `least` is None (symmetric), else both
    [rows, cols / 32] and weight = code * scale + least."""

    bits: int
    codes: Tensor
    scales: Tensor
    least: Tensor | None


@dataclass(frozen=True, slots=True)
class Narrow:
    """A matrix; see the head of this file."""

    bits: int
    symmetric: bool
    codes: Tensor  # i32 [rows, groups * width]
    high: Tensor | None  # i32 [rows, groups * (bits - 4)]
    scales: Tensor  # i32 [rows, groups]

    @property
    def width(self) -> int:
        return 8 if self.bits == 8 else 4

    @property
    def shape(self) -> tuple[int, int]:
        rows, groups = self.scales.shape
        return rows, groups * GROUP

    @property
    def form(self) -> tuple[int, bool, int]:
        """Matrices of one form can be stacked."""
        return self.bits, self.symmetric, self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + (0 if self.high is None else self.high.nbytes)

    def __getitem__(self, rows: slice | Tensor) -> Narrow:
        high = None if self.high is None else self.high[rows]
        return Narrow(self.bits, self.symmetric, self.codes[rows], high, self.scales[rows])

    def dequantized(self) -> Tensor:
        """f32 [rows, cols]"""
        rows, cols = self.shape
        first = self.scales.to(torch.int16).view(torch.float16).to(torch.float32)
        second = (self.scales >> 16).to(torch.int16).view(torch.float16).to(torch.float32)
        codes = self._codes().to(torch.float32).view(rows, cols // GROUP, GROUP)
        if self.symmetric:
            scales = torch.stack((first, second), -1).repeat_interleave(GROUP // 2, -1)
            centred: Tensor = codes - 2 ** (self.bits - 1)
            return (centred * scales).view(rows, cols)
        return (codes * first[..., None] + second[..., None]).view(rows, cols)

    def _codes(self) -> Tensor:
        """i32 [rows, cols]"""
        rows, cols = self.shape
        width = self.width
        shifts = torch.arange(0, 32, width, device=self.codes.device)
        codes: Tensor = ((self.codes.view(rows, -1, 1, width) >> shifts[:, None]) & (1 << width) - 1).reshape(rows, cols)
        if self.high is not None:
            extra = self.bits - 4
            more = (self.high.view(rows, -1, 1) >> torch.arange(0, 32, extra, device=codes.device)) & (1 << extra) - 1
            codes |= more.reshape(rows, cols) << 4
        return codes


def pack(coded: Coded) -> Narrow:
    rows, cols = coded.codes.shape
    width = 8 if coded.bits == 8 else 4
    planes = coded.codes.view(rows, cols // GROUP, GROUP // width, width)
    words = torch.zeros((rows, cols // GROUP, width), dtype=torch.int32, device=coded.codes.device)
    for plane in range(GROUP // width):
        words |= (planes[:, :, plane].to(torch.int32) & (1 << width) - 1) << width * plane
    high = None
    if coded.bits in (5, 6):
        extra = coded.bits - 4
        fields = (coded.codes >> 4).view(rows, -1, GROUP // extra)
        high = torch.zeros(fields.shape[:2], dtype=torch.int32, device=words.device)
        for place in range(GROUP // extra):
            high |= fields[:, :, place].to(torch.int32) << extra * place
    first, second = (coded.scales, coded.least) if coded.least is not None else (coded.scales[:, ::2], coded.scales[:, 1::2])
    halves = [half.to(torch.float16).contiguous().view(torch.int16).to(torch.int32) for half in (first, second)]
    scales = (halves[0] & 0xFFFF) | halves[1] << 16
    return Narrow(coded.bits, coded.least is None, words.view(rows, -1), high, scales)


def stacked(parts: list[Narrow]) -> tuple[Narrow, ...]:
    """The same rows in fewer matrices: neighbours of one form become one."""
    found: list[list[Narrow]] = []
    for part in parts:
        if found and found[-1][0].form == part.form:
            found[-1].append(part)
        else:
            found.append([part])
    return tuple(joined(same) for same in found)


def joined(parts: list[Narrow]) -> Narrow:
    """The rows of several matrices of one form as one."""
    if len(parts) == 1:
        return parts[0]
    highs = [part.high for part in parts if part.high is not None]
    codes, scales = torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts])
    return Narrow(parts[0].bits, parts[0].symmetric, codes, torch.cat(highs) if highs else None, scales)


@dataclass(frozen=True, slots=True)
class NarrowLinear:
    """Projections of packed weights with PyTorch alone: a tile at a time is dequantised and multiplied."""

    parts: tuple[Narrow, ...]
    bias: Tensor | None

    @property
    def rows(self) -> int:
        return sum(part.shape[0] for part in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        step = max(1, TILE_VALUES // x.shape[1])
        tiles = [part[start : start + step] for part in self.parts for start in range(0, part.shape[0], step)]
        out = torch.cat([linear(x, tile.dequantized().to(x.dtype)) for tile in tiles], -1)
        return out if self.bias is None else out + self.bias


@dataclass(frozen=True, slots=True)
class NarrowEmbedding:
    weight: Narrow

    def __getitem__(self, tokens: Tensor) -> Tensor:
        """i64 [T] -> f32 [T, hidden_size]"""
        return self.weight[tokens].dequantized()
