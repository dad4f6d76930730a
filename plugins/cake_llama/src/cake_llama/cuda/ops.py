"""The operations of a decode step over tensors of fixed size, as a graph needs them: at batch 1 everything is fused into the
products, above it stands around them.

What a product above batch 1 leaves is [parts, B, rows]: one tensor of cuBLAS, or the splits of a product of narrow weights,
in f32, which the next kernel adds as it reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear

from cake_llama.cache import BLOCK
from cake_llama.cuda import attention_kernels, kernels, narrow_ops
from cake_llama.model import Linear, Norm
from cake_llama.narrow_matrix import NarrowLinear

_WARPS = 8
_WIDE = 2048
"""Weights of a row that a program reads at a time."""
_SPLITS = 32
"""Parts of a sequence that are attended to at once, at most."""
_SPAN = 32
"""Positions that a program attends to at a time."""


@cache
def starts_early(device: torch.device) -> bool:
    """Whether kernels may start while the one before them still runs (programmatic dependent launch)."""
    return kernels.HAS_PDL and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launching(x: Tensor) -> tuple[bool, dict[str, Any]]:
    """Whether a kernel over x starts early, for itself and for the launch."""
    early = starts_early(x.device)
    return early, {"launch_pdl": True} if early else {}


@dataclass(frozen=True, slots=True)
class Scratch:
    """Tensors that one step needs and the next may overwrite."""

    attended: Tensor  # [B, H * D]
    partial: Tensor  # [B, H, splits, D] f32
    stats: Tensor  # [B, H, splits, 2] f32
    counters: Tensor  # i32 [B, KVH], zero between steps
    splits: int

    @classmethod
    def make(cls, batch: int, heads: int, kv_heads: int, dim: int, like: Tensor) -> Scratch:
        programs = 4 * torch.cuda.get_device_properties(like.device).multi_processor_count if like.is_cuda else 8
        splits = min(_SPLITS, max(1, triton.next_power_of_2(programs // (batch * kv_heads))))
        return cls(
            like.new_empty((batch, heads * dim)),
            like.new_empty((batch, heads, splits, dim), dtype=torch.float32),
            like.new_empty((batch, heads, splits, 2), dtype=torch.float32),
            torch.zeros((batch, kv_heads), dtype=torch.int32, device=like.device),
            splits,
        )


def product_one(
    x: Tensor, layer: Linear | NarrowLinear, norm: Norm | None = None, residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """[1, size] -> [1, rows], with the norm before it and the residual after it."""
    if isinstance(layer, NarrowLinear):
        return narrow_ops.matvec(x, layer, norm, residual, dtype or x.dtype, launching(x))
    total, size = layer.weight.shape
    out = torch.empty((1, total), dtype=dtype or x.dtype, device=x.device)
    rows = 2 if total >= 16384 else 1
    block = min(_WIDE, triton.next_power_of_2(size))
    early, options = launching(x)
    kernels.matvec_kernel[(triton.cdiv(total, rows),)](
        x, norm and norm.weight, layer.weight, layer.bias, residual, out, norm.eps if norm else 0.0, total, size, rows, block,
        norm is not None, layer.bias is not None, residual is not None, early, num_warps=_WARPS, **options,
    )  # fmt: skip
    return out


def gated_one(x: Tensor, layer: Linear | NarrowLinear, norm: Norm) -> Tensor:
    """[1, size] -> [1, rows]: norm, both halves of [2 * rows, size], silu, product."""
    if isinstance(layer, NarrowLinear):
        if len(layer.parts) == 1:
            return narrow_ops.gated_matvec(x, layer, norm, launching(x))
        return silu_mul(product_one(x, layer, norm)[None], x.dtype)
    total, size = layer.weight.shape[0] // 2, layer.weight.shape[1]
    out = torch.empty((1, total), dtype=x.dtype, device=x.device)
    block = min(_WIDE, triton.next_power_of_2(size))
    early, options = launching(x)
    kernels.gated_matvec_kernel[(total,)](
        x, norm.weight, layer.weight, out, norm.eps, total, size, 1, block, early, num_warps=_WARPS, **options
    )
    return out


def product_many(x: Tensor, layer: Linear | NarrowLinear) -> Tensor:
    """[B, size] -> [parts, B, rows]; the bias of narrow weights is not in it yet where there are several parts."""
    if isinstance(layer, NarrowLinear):
        return narrow_ops.matmul(x, layer, launching(x))
    return linear(x, layer.weight, layer.bias)[None]


def add_norm(x: Tensor, delta: Tensor | None, norm: Norm) -> Tensor:
    """x += the parts of delta, in place; returns norm(x), [B, size]."""
    out = torch.empty_like(x)
    size = x.shape[1]
    early, options = launching(x)
    kernels.add_norm_kernel[(len(x),)](
        x, delta, norm.weight, out, norm.eps, x.numel(), size, triton.next_power_of_2(size), 0 if delta is None else len(delta),
        early, num_warps=_WARPS, **options,
    )  # fmt: skip
    return out


def silu_mul(gate_up: Tensor, dtype: torch.dtype) -> Tensor:
    """[parts, B, 2 * size] -> [B, size]."""
    parts, batch, size = gate_up.shape[0], gate_up.shape[1], gate_up.shape[2] // 2
    out = gate_up.new_empty((batch, size), dtype=dtype)
    early, options = launching(gate_up)
    kernels.silu_mul_kernel[(batch, triton.cdiv(size, 1024))](
        gate_up, out, size, gate_up[0].numel(), 1024, parts, early, **options
    )
    return out


@dataclass(frozen=True, slots=True)
class Places:
    """Where the rows of a step are: `inputs` i32 [B, 3] with their positions second and their slots third, `tables` i32
    [slots, width] of cache blocks (-1: an unused row's)."""

    inputs: Tensor
    tables: Tensor
    cos: Tensor  # [positions, half] f32
    sin: Tensor


def attend(
    qkv: Tensor, cache: tuple[Tensor, Tensor], places: Places, scratch: Scratch, norms: tuple[Norm, Norm] | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    """Rotates, writes the cache and attends: qkv [parts, B, (H + 2 KVH) D] -> [B, H * D]."""
    keys, values = cache
    batch, kv_heads, dim = qkv.shape[1], keys.shape[1], keys.shape[2]
    heads = scratch.attended.shape[1] // dim
    q_norm, k_norm = (norms[0].weight, norms[1].weight) if norms else (None, None)
    early, options = launching(qkv)
    attention_kernels.attention_kernel[(batch, kv_heads, scratch.splits)](
        qkv, keys, values, places.cos, places.sin, q_norm, k_norm, places.inputs, places.tables, places.tables.shape[1],
        scratch.partial, scratch.stats, scratch.counters, scratch.attended, norms[0].eps if norms else 0.0, dim**-0.5,
        window or 1 << 30, batch, heads, kv_heads, dim, places.cos.shape[1], triton.next_power_of_2(dim), BLOCK,
        scratch.splits, _SPAN, len(qkv), triton.next_power_of_2(heads // kv_heads), norms is not None, early, num_warps=2,
        **options,
    )  # fmt: skip
    return scratch.attended


def turn(
    qkv: Tensor, cache: tuple[Tensor, Tensor], places: Tensor, angles: tuple[Tensor, Tensor], heads: int,
    norms: tuple[Norm, Norm] | None,
) -> Tensor:  # fmt: skip
    """Prompt positions: rotates and writes keys and values to the cache. qkv [T, (H + 2 KVH) D] -> queries [T, H, D].

    `places` i32 [2, T]: positions and slots; `angles`: cosines and sines [positions, half] in f32.
    """
    keys, values = cache
    kv_heads, dim = keys.shape[1], keys.shape[2]
    out = qkv.new_empty((len(qkv), heads, dim))
    q_norm, k_norm = (norms[0].weight, norms[1].weight) if norms else (None, None)
    early, options = launching(qkv)
    attention_kernels.turn_kernel[(len(qkv), kv_heads)](
        qkv, keys, values, *angles, q_norm, k_norm, places, out, norms[0].eps if norms else 0.0, len(qkv), heads, kv_heads, dim,
        angles[0].shape[1], triton.next_power_of_2(dim), triton.next_power_of_2(heads // kv_heads), norms is not None, early,
        num_warps=1, **options,
    )  # fmt: skip
    return out
