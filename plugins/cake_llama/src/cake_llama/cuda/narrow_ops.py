"""Products of narrow weights on a GPU: one row and small batches on the weights as they are, larger ones by cuBLAS, a tile
dequantised at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from cake_llama.cuda import narrow_kernels, narrow_matvec
from cake_llama.model import Norm
from cake_llama.narrow_matrix import TILE_VALUES, Narrow, NarrowEmbedding, NarrowLinear

SMALL = 64
"""Rows of a batch up to which weights are dequantised in registers."""
_ONE = 0x3F800000
"""The bits of 1.0."""
_MANY_GROUPS = 4096 * 128
"""Groups of a matrix above which a program takes 16 rows, not 8: more work on each value of x, and programs enough."""
_PROGRAMS = 8
"""Programs of a product for each multiprocessor, so that they hide one another's waits."""

Launching = tuple[bool, dict[str, Any]]
"""Whether a kernel starts early, for itself and for the launch."""


def matvec(
    x: Tensor, layer: NarrowLinear, norm: Norm | None, residual: Tensor | None, dtype: torch.dtype, launching: Launching
) -> Tensor:
    """[1, size] -> [1, rows], with the norm before it, bias and residual after it."""
    out = torch.empty((1, layer.rows), dtype=dtype, device=x.device)
    start = 0
    for part in layer.parts:
        own = slice(start, start + part.shape[0])
        bias = None if layer.bias is None else layer.bias[own]
        rest = None if residual is None else residual[:, own]
        _matvec(x, part, norm, (bias, rest), out[:, own], False, launching)
        start = own.stop
    return out


def gated_matvec(x: Tensor, layer: NarrowLinear, norm: Norm, launching: Launching) -> Tensor:
    """[1, size] -> [1, rows / 2]: norm, product, silu of the first half times the second."""
    out = torch.empty((1, layer.rows // 2), dtype=x.dtype, device=x.device)
    _matvec(x, layer.parts[0], norm, (None, None), out, True, launching)
    return out


def _matvec(
    x: Tensor, w: Narrow, norm: Norm | None, after: tuple[Tensor | None, Tensor | None], out: Tensor, gated: bool,
    launching: Launching,
) -> None:  # fmt: skip
    total, groups = w.scales.shape
    rows = 16 if w.bits < 8 and total * groups > _MANY_GROUPS else 8
    block = min(128, triton.next_power_of_2(groups))
    early, options = launching
    bias, residual = after
    emulated = not x.is_cuda or torch.version.hip is not None
    has = (gated, norm is not None, bias is not None, residual is not None, early)
    weight, eps = (norm.weight, norm.eps) if norm else (None, 0.0)
    grid, shape = (triton.cdiv(total, rows),), (groups, rows, block, w.width, w.bits, w.symmetric)
    if w.bits in (4, 8):
        narrow_matvec.narrow_matvec8_kernel[grid](
            x, weight, w.codes, w.scales, bias, residual, out, eps, total, *shape, *has, emulated, num_warps=4, **options
        )
    else:
        narrow_matvec.narrow_matvec_kernel[grid](
            x, weight, w.codes, w.high, w.scales, bias, residual, out, eps, total, _ONE, *shape, *has, num_warps=4, **options
        )


def matmul(x: Tensor, layer: NarrowLinear, launching: Launching) -> Tensor:
    """[B, size] -> f32 [splits, B, rows], the bias in the first."""
    batch, groups = len(x), layer.parts[0].scales.shape[1]
    rows, block = 64, 4
    blocks = triton.cdiv(groups, block)
    programs = _PROGRAMS * _multiprocessors(x.device)
    splits = min(blocks, max(1, programs // triton.cdiv(layer.rows, rows)))
    share = triton.cdiv(blocks, splits) * block
    splits = triton.cdiv(groups, share)
    out = torch.empty((splits, batch, layer.rows), dtype=torch.float32, device=x.device)
    early, options = launching
    start = 0
    for w in layer.parts:
        total = w.shape[0]
        narrow_kernels.narrow_matmul_kernel[(triton.cdiv(total, rows), splits)](
            x, w.codes, w.high, w.scales, out[:, :, start:], total, batch, layer.rows, _ONE, groups,
            max(16, triton.next_power_of_2(batch)), rows, block, share, w.width, w.bits, w.symmetric, early,
            num_warps=4, num_stages=3, **options,
        )  # fmt: skip
        start += total
    if layer.bias is not None:
        out[0] += layer.bias
    return out


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def unpack(w: Narrow, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    """The weights of all rows, or of those at `rows` (i64), [rows, size]."""
    groups = w.scales.shape[1]
    count = w.scales.shape[0] if rows is None else len(rows)
    out = torch.empty((count, groups * 32), dtype=dtype, device=w.scales.device)
    block = min(64, triton.next_power_of_2(groups))
    narrow_kernels.unpack_kernel[(count, triton.cdiv(groups, block))](
        w.codes, w.high, w.scales, rows, out, groups, _ONE, block, w.width, w.bits, w.symmetric, rows is not None, num_warps=2
    )
    return out


@dataclass(frozen=True, slots=True)
class CudaLinear(NarrowLinear):
    """As the model's own code calls it: prompt chunks, and the head at a few positions."""

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) <= SMALL:
            return matmul(x.contiguous(), self, (False, {})).sum(0).to(x.dtype)
        out = torch.empty((len(x), self.rows), dtype=x.dtype, device=x.device)
        step, start = max(1, TILE_VALUES // x.shape[1]), 0
        for part in self.parts:
            for first in range(0, part.shape[0], step):
                tile = unpack(part[first : first + step], x.dtype)
                torch.mm(x, tile.t(), out=out[:, start : start + len(tile)])
                start += len(tile)
        return out if self.bias is None else out.add_(self.bias)


@dataclass(frozen=True, slots=True)
class CudaEmbedding(NarrowEmbedding):
    dtype: torch.dtype

    def __getitem__(self, tokens: Tensor) -> Tensor:
        return unpack(self.weight, self.dtype, tokens)
