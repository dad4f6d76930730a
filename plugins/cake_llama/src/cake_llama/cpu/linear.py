"""Matrices, projections and embeddings that cake-kernels multiplies with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import cake_kernels
from cake_llama.packed import Blocks, Groups, Packed, Scaled


@dataclass(frozen=True, slots=True)
class Weight:
    """One matrix as the kernels want it, with the memory it lives in."""

    matrix: cake_kernels.Matrix
    memory: Tensor
    order: Tensor | None = None
    """Of the input's values, where the columns are sorted by group."""

    @property
    def rows(self) -> int:
        return int(self.matrix.rows)


PIECE_ROWS = 16
"""Rows that the kernels interleave."""


class Packing:
    """A matrix that is filled piece by piece, so that a load needs little beside the weights themselves. `like`: any piece."""

    def __init__(self, shape: tuple[int, int], like: Packed, pool: cake_kernels.Pool) -> None:
        rows, cols = shape
        self._kind, self._cols, self._group, self._pool = like.kind, cols, like.group, pool
        memory = _aligned(cake_kernels.packed_bytes(like.kind, rows, cols, like.group))
        matrix = cake_kernels.Matrix(memory.data_ptr(), cake_kernels.TYPES[like.kind], rows, cols, like.group)
        self.weight = Weight(matrix, memory, like.order)

    def put(self, start: int, rows: Packed) -> None:
        """Rows from `start` on; all but the last piece hold a multiple of PIECE_ROWS of them."""
        count = rows.shape[0]
        before = cake_kernels.packed_bytes(self._kind, start, self._cols, self._group) if start else 0
        at = self.weight.memory.data_ptr() + before
        matrix = cake_kernels.Matrix(at, cake_kernels.TYPES[self._kind], count, self._cols, self._group)
        match rows:
            case Groups():
                self._pool.pack_groups(matrix, rows.codes.data_ptr(), rows.scales.data_ptr(), rows.zeros.data_ptr())
            case Blocks():
                self._pool.pack(matrix, rows.data.data_ptr())
            case _:
                raise TypeError(f"{rows.kind} is not packed")


def plain_weight(rows: Packed) -> Weight:
    """F32, F16 or BF16 rows, multiplied where they lie."""
    if not isinstance(rows, Blocks) or rows.kind not in cake_kernels.PLAIN:
        raise TypeError(f"{rows.kind} is not plain")
    count, cols = rows.shape
    return Weight(cake_kernels.Matrix(rows.data.data_ptr(), cake_kernels.TYPES[rows.kind], count, cols, 0), rows.data)


def scaled_weight(rows: Scaled) -> Weight:
    """8-bit floats, row after row, and behind them the scales of each row's groups of columns."""
    (count, cols), wide = rows.shape, rows.block[1]
    by_row = rows.scales_by_row()
    memory = torch.empty(count * cols + by_row.nbytes, dtype=torch.uint8)
    memory[: count * cols] = rows.values.view(torch.uint8).reshape(-1)
    memory[count * cols :] = by_row.view(torch.uint8).reshape(-1)
    return Weight(cake_kernels.Matrix(memory.data_ptr(), cake_kernels.TYPES["F8"], count, cols, wide), memory)


def _aligned(nbytes: int) -> Tensor:
    memory = torch.empty(nbytes + cake_kernels.ALIGNMENT, dtype=torch.uint8)
    cake_kernels.use_large_pages(memory.data_ptr(), memory.nbytes)
    start = -memory.data_ptr() % cake_kernels.ALIGNMENT
    return memory[start : start + nbytes]


@dataclass(frozen=True, slots=True)
class NativeLinear:
    """One or several projections of the same input, their outputs side by side."""

    parts: tuple[Weight, ...]
    bias: Tensor | None
    """f32 [out] over all parts."""
    pool: cake_kernels.Pool

    def __call__(self, x: Tensor) -> Tensor:
        """f32 [T, in] -> f32 [T, out]"""
        x = x.to(torch.float32).contiguous()
        out = sum(part.rows for part in self.parts)
        y = torch.empty((len(x), out), dtype=torch.float32)
        at = 0
        for index, part in enumerate(self.parts):
            own = x if part.order is None else x[:, part.order]
            self.pool.matmul(part.matrix, self.bias_of(index), own.data_ptr(), y.data_ptr() + 4 * at, len(x), out)
            at += part.rows
        return y

    @property
    def in_order(self) -> bool:
        return all(part.order is None for part in self.parts)

    def bias_of(self, index: int) -> int | None:
        """Address of the bias of a part."""
        if self.bias is None:
            return None
        return self.bias.data_ptr() + 4 * sum(part.rows for part in self.parts[:index])


@dataclass(frozen=True, slots=True)
class NativeEmbedding:
    weight: Weight

    def __getitem__(self, tokens: Tensor) -> Tensor:
        """i64 [T] -> f32 [T, hidden_size]"""
        ids = tokens.to(torch.int32)
        out = torch.empty((len(ids), self.weight.matrix.cols), dtype=torch.float32)
        cake_kernels.rows(self.weight.matrix, ids.data_ptr(), len(ids), out.data_ptr())
        return out
