"""Matrices at the width of their file, before a device takes them; and what they are in f32.

Three forms: `Blocks` are GGUF's, bytes as they are in the file; `Groups` are codes with a scale and a zero for some columns
of a row, what GPTQ, AWQ, compressed-tensors and `--quantize int4` are; `Scaled` are 8-bit floats with a scale for a rectangle.
Every device may lay them out anew when it takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from cake_llama.dequant import dequantize

UNIT = 32
"""Columns whose nibbles lie together; a group is a multiple of it."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows of a GGUF type (F32, F16 and BF16 among them), as bytes: `data` u8 [rows, bytes a row]."""

    kind: str
    shape: tuple[int, int]
    data: Tensor

    group: ClassVar[int] = 0
    """Columns a group: these types know their own."""
    order: ClassVar[None] = None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def rows(self, start: int, stop: int) -> Blocks:
        return Blocks(self.kind, (stop - start, self.shape[1]), self.data[start:stop])

    def dequantized(self) -> Tensor:
        """f32 [rows, cols]"""
        if self.kind in _WIDTHS:
            return self.data.reshape(-1).view(_WIDTHS[self.kind]).view(self.shape).to(torch.float32)
        return torch.from_numpy(dequantize(self.kind, self.data.reshape(-1).numpy())).view(self.shape)


@dataclass(frozen=True, slots=True)
class Groups:
    """w[r, c] = (code[r, c] - zero[r, c // group]) * scale[r, c // group], in 4 or 8 bit.

    `order` (i32 [cols], None: as they come): column c of the codes multiplies value order[c] of the input. A file that scatters
    its groups over the columns is sorted so that each group is a run.
    """

    kind: str
    """G4 or G8."""
    codes: Tensor
    """u8 [rows, bytes]. G8: a byte a column. G4: of each 32 columns, byte j holds column j in its low nibble and column
    16 + j in its high one, as GGUF has them."""
    scales: Tensor
    """f16 [rows, groups]; the last group of a row may be short."""
    zeros: Tensor
    """u8 [rows, groups]"""
    group: int
    """Columns a group, a multiple of 32."""
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, nbytes = self.codes.shape
        return rows, nbytes * 2 if self.kind == "G4" else nbytes

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes

    def rows(self, start: int, stop: int) -> Groups:
        own = slice(start, stop)
        return replace(self, codes=self.codes[own], scales=self.scales[own], zeros=self.zeros[own])

    def dequantized(self) -> Tensor:
        """f32 [rows, cols], columns as the codes have them."""
        rows, cols = self.shape
        codes = nibbles(self.codes) if self.kind == "G4" else self.codes
        whole = cols // self.group * self.group
        values = codes.to(torch.float32)
        scales, zeros = self.scales.to(torch.float32)[..., None], self.zeros.to(torch.float32)[..., None]
        count = whole // self.group
        values[:, :whole].view(rows, count, self.group).sub_(zeros[:, :count]).mul_(scales[:, :count])
        if whole < cols:
            values[:, whole:].sub_(zeros[:, -1]).mul_(scales[:, -1])
        return values


@dataclass(frozen=True, slots=True)
class Scaled:
    """w = value * scale: 8-bit floats [rows, cols], scales f32 [row blocks, column blocks] of `block` = (rows, columns) each.

    `first`: which row of its block the first row is."""

    values: Tensor
    scales: Tensor
    block: tuple[int, int]
    first: int = 0

    kind: ClassVar[str] = "F8"
    group: ClassVar[int] = 0
    order: ClassVar[None] = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.values.shape
        return rows, cols

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def rows(self, start: int, stop: int) -> Scaled:
        start, stop, high = start + self.first, stop + self.first, self.block[0]
        scales = self.scales[start // high : -(-stop // high)]
        return Scaled(self.values[start - self.first : stop - self.first], scales, self.block, start % high)

    def scales_by_row(self) -> Tensor:
        """f32 [rows, column blocks]"""
        return self.scales[(torch.arange(len(self.values)) + self.first) // self.block[0]]

    def dequantized(self) -> Tensor:
        """f32 [rows, cols]"""
        by_row, wide = self.scales_by_row(), self.block[1]
        values = self.values.to(torch.float32)
        for index in range(self.scales.shape[1]):
            values[:, index * wide : (index + 1) * wide].mul_(by_row[:, index : index + 1])
        return values


Packed = Blocks | Groups | Scaled


def joined(pieces: Sequence[Blocks | Groups]) -> Blocks | Groups:
    """Pieces of one matrix below one another."""
    first = pieces[0]
    if isinstance(first, Blocks):
        data = torch.cat([piece.data for piece in pieces if isinstance(piece, Blocks)])
        return Blocks(first.kind, (len(data), first.shape[1]), data)
    groups = [piece for piece in pieces if isinstance(piece, Groups)]
    codes, scales, zeros = (torch.cat([getattr(piece, name) for piece in groups]) for name in ("codes", "scales", "zeros"))
    return replace(first, codes=codes, scales=scales, zeros=zeros)


PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_WIDTHS = {name: dtype for dtype, name in PLAIN.items()}


def stored(weight: Tensor) -> Blocks:
    """A plain tensor [rows, cols]; memory is shared."""
    rows, cols = weight.shape
    return Blocks(PLAIN[weight.dtype], (rows, cols), weight.contiguous().view(torch.uint8).view(rows, -1))


def grouped(blocks: Blocks) -> Packed:
    """Q4_0 and Q8_0 as the groups that they are, which PyTorch dequantises several times faster; other types as they are."""
    if blocks.kind not in ("Q4_0", "Q8_0"):
        return blocks
    units = blocks.data.view(len(blocks.data), blocks.shape[1] // UNIT, -1)
    scales = units[:, :, :2].contiguous().view(torch.float16).squeeze(-1)
    codes = units[:, :, 2:].reshape(len(units), -1)
    if blocks.kind == "Q4_0":
        return Groups("G4", codes, scales, torch.full_like(scales, 8, dtype=torch.uint8), UNIT)
    return Groups("G8", codes ^ 0x80, scales, torch.full_like(scales, 128, dtype=torch.uint8), UNIT)


def pack_nibbles(codes: Tensor) -> Tensor:
    """u8 [rows, cols] of 0..15 -> u8 [rows, cols / 2] as `Groups` has them."""
    units = codes.reshape(len(codes), -1, 2, UNIT // 2)
    return (units[:, :, 0] | (units[:, :, 1] << 4)).reshape(len(codes), -1).contiguous()


def nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    halves = packed.reshape(len(packed), -1, 1, UNIT // 2)
    return torch.cat((halves & 15, halves >> 4), 2).reshape(len(packed), -1)
