"""The operations of a decode step over tensors of fixed size, as a graph needs them: Triton at any batch, at batch 1 with
everything fused into the products, above it around the products of cuBLAS."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from cake_llama.cache import BLOCK
from cake_llama.cuda import kernels

_WARPS = 8
_WIDE = 2048
"""Weights of a row that a program reads at a time."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """Tensors that one step needs and the next may overwrite."""

    q: Tensor  # [B, H, D]
    attended: Tensor  # [B, H * D]
    partial: Tensor  # [B, H, splits, D] f32
    stats: Tensor  # [B, H, splits, 2] f32
    splits: int

    @classmethod
    def make(cls, batch: int, heads: int, kv_heads: int, dim: int, like: Tensor) -> Scratch:
        programs = 2 * torch.cuda.get_device_properties(like.device).multi_processor_count
        splits = min(32, max(1, triton.next_power_of_2(programs // (batch * kv_heads))))
        return cls(
            like.new_empty((batch, heads, dim)),
            like.new_empty((batch, heads * dim)),
            like.new_empty((batch, heads, splits, dim), dtype=torch.float32),
            like.new_empty((batch, heads, splits, 2), dtype=torch.float32),
            splits,
        )


def matvec(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, norm: Tensor | None = None, eps: float = 0.0,
    residual: Tensor | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """[1, size] times [rows, size] transposed, with whatever stands before and after it."""
    total, size = weight.shape
    out = torch.empty((1, total), dtype=dtype or x.dtype, device=x.device)
    rows = 2 if total >= 16384 else 1
    block = min(_WIDE, triton.next_power_of_2(size))
    kernels.matvec_kernel[(triton.cdiv(total, rows),)](
        x, norm, weight, bias, residual, out, eps, total, size, triton.next_power_of_2(size), rows, block,
        norm is not None, bias is not None, residual is not None, num_warps=_WARPS,
    )  # fmt: skip
    return out


def gated_matvec(x: Tensor, weight: Tensor, norm: Tensor, eps: float) -> Tensor:
    """[1, size] -> [1, rows]: norm, both halves of [2 * rows, size], silu, product."""
    total, size = weight.shape[0] // 2, weight.shape[1]
    out = torch.empty((1, total), dtype=x.dtype, device=x.device)
    block = min(_WIDE, triton.next_power_of_2(size))
    kernels.gated_matvec_kernel[(total,)](
        x, norm, weight, out, eps, total, size, triton.next_power_of_2(size), 1, block, num_warps=_WARPS
    )
    return out


def add_norm(x: Tensor, delta: Tensor | None, norm: Tensor, eps: float) -> Tensor:
    """x += delta in place; returns norm(x), [B, size]."""
    out = torch.empty_like(x)
    size = x.shape[1]
    kernels.add_norm_kernel[(len(x),)](
        x, delta, norm, out, eps, size, triton.next_power_of_2(size), delta is not None, num_warps=_WARPS
    )
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """[B, 2 * size] -> [B, size]."""
    batch, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((batch, size))
    kernels.silu_mul_kernel[(batch, triton.cdiv(size, 1024))](gate_up, out, size, 1024)
    return out


@dataclass(frozen=True, slots=True)
class Places:
    """Where the rows of a step are: `positions` i32 [B], `table` i32 [B, width] of cache blocks (-1: an unused row)."""

    positions: Tensor
    table: Tensor
    cos: Tensor  # [positions, half] f32
    sin: Tensor


def attend(
    qkv: Tensor, keys: Tensor, values: Tensor, places: Places, scratch: Scratch, norms: tuple[Tensor, Tensor] | None,
    eps: float, window: int | None,
) -> Tensor:  # fmt: skip
    """Rotates, writes the cache and attends: qkv [B, (H + 2 KVH) D] -> [B, H * D]."""
    batch, heads, dim = scratch.q.shape
    kv_heads, half = keys.shape[1], places.cos.shape[1]
    padded, width = triton.next_power_of_2(dim), places.table.shape[1]
    q_norm, k_norm = norms or (None, None)
    kernels.rotate_write_kernel[(batch, heads + 2 * kv_heads)](
        qkv, scratch.q, keys, values, places.cos, places.sin, q_norm, k_norm, places.positions, places.table, width, eps,
        heads, kv_heads, dim, half, padded, BLOCK, norms is not None, num_warps=1,
    )  # fmt: skip
    kernels.attention_kernel[(batch, kv_heads, scratch.splits)](
        scratch.q, keys, values, places.positions, places.table, width, scratch.partial, scratch.stats, dim**-0.5,
        window or 1 << 30, heads, kv_heads, heads // kv_heads, dim, padded, BLOCK, scratch.splits, 32, num_warps=4,
    )  # fmt: skip
    kernels.combine_kernel[(batch * heads,)](
        scratch.partial, scratch.stats, scratch.attended, dim, padded, scratch.splits, num_warps=1
    )
    return scratch.attended
