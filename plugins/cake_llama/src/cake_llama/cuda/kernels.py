"""Triton kernels of a decode step. At batch 1 a step is a walk through the weights, so each product reads its matrix once at
the memory's speed and does its neighbours' work on the way: the norm before it, the residual, the gated activation after it.

B rows of a batch, H query heads in groups of G that share one of KVH key heads, D dimensions a head. Sums are in f32; what
crosses a kernel is in the model's dtype, where PyTorch's own path rounds too.
"""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
# Triton compiles these functions from their source: annotations other than constexpr would change what they mean.


@triton.jit
def _inverse_rms(x_ptr, eps, size: tl.constexpr, padded: tl.constexpr):
    """1 / root mean square of a vector; every program of a product computes it again, from cache, sooner than another
    kernel could start."""
    at = tl.arange(0, padded)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(x * x) / size + eps)


@triton.jit
def _normed(x, weight_ptr, at, inverse, size: tl.constexpr, dtype: tl.constexpr):
    weight = tl.load(weight_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    return (x * inverse * weight).to(dtype).to(tl.float32)


@triton.jit
def matvec_kernel(
    x_ptr, norm_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, eps, rows_total,
    size: tl.constexpr, padded: tl.constexpr, rows: tl.constexpr, block: tl.constexpr,
    has_norm: tl.constexpr, has_bias: tl.constexpr, has_residual: tl.constexpr,
):  # fmt: skip
    """out[n] = sum_k w[n, k] * norm(x)[k] (+ bias[n]) (+ residual[n]); w is [rows_total, size]."""
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    inverse = _inverse_rms(x_ptr, eps, size, padded) if has_norm else 1.0
    sums = tl.zeros((rows, block), tl.float32)
    for start in range(0, size, block):
        at = start + tl.arange(0, block)
        x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        if has_norm:
            x = _normed(x, norm_ptr, at, inverse, size, x_ptr.dtype.element_ty)
        mask = (row[:, None] < rows_total) & (at[None, :] < size)
        w = tl.load(w_ptr + row[:, None].to(tl.int64) * size + at[None, :], mask=mask, other=0.0)
        sums += w.to(tl.float32) * x[None, :]
    result = tl.sum(sums, 1)
    inside = row < rows_total
    if has_bias:
        result += tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32)
    if has_residual:
        result = result.to(x_ptr.dtype.element_ty).to(tl.float32)
        result += tl.load(residual_ptr + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gated_matvec_kernel(
    x_ptr, norm_ptr, w_ptr, out_ptr, eps, rows_total,
    size: tl.constexpr, padded: tl.constexpr, rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """out[n] = silu(w[n] . norm(x)) * (w[n + rows_total] . norm(x)); w is [2 * rows_total, size], gate above up."""
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    inverse = _inverse_rms(x_ptr, eps, size, padded)
    gate_sums = tl.zeros((rows, block), tl.float32)
    up_sums = tl.zeros((rows, block), tl.float32)
    for start in range(0, size, block):
        at = start + tl.arange(0, block)
        x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        x = _normed(x, norm_ptr, at, inverse, size, x_ptr.dtype.element_ty)
        mask = (row[:, None] < rows_total) & (at[None, :] < size)
        place = w_ptr + row[:, None].to(tl.int64) * size + at[None, :]
        gate_sums += tl.load(place, mask=mask, other=0.0).to(tl.float32) * x[None, :]
        up_sums += tl.load(place + rows_total.to(tl.int64) * size, mask=mask, other=0.0).to(tl.float32) * x[None, :]
    dtype = x_ptr.dtype.element_ty
    gate = tl.sum(gate_sums, 1).to(dtype).to(tl.float32)
    up = tl.sum(up_sums, 1).to(dtype).to(tl.float32)
    activated = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
    tl.store(out_ptr + row, (activated * up).to(dtype), mask=row < rows_total)


@triton.jit
def add_norm_kernel(
    x_ptr, delta_ptr, norm_ptr, out_ptr, eps, size: tl.constexpr, padded: tl.constexpr, has_delta: tl.constexpr
):  # fmt: skip
    """One program a row: x += delta, written back; out = norm(x). For batches above 1."""
    at = tl.arange(0, padded)
    start = tl.program_id(0).to(tl.int64) * size
    inside = at < size
    x = tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
    if has_delta:
        x += tl.load(delta_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
        tl.store(x_ptr + start + at, x.to(x_ptr.dtype.element_ty), mask=inside)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x) / size + eps)
    weight = tl.load(norm_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + at, (x * inverse * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul_kernel(gate_up_ptr, out_ptr, size, block: tl.constexpr):
    """out[b] = silu(gate[b]) * up[b] for gate_up [B, 2 * size]."""
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < size
    start = tl.program_id(0).to(tl.int64) * size
    gate = tl.load(gate_up_ptr + 2 * start + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + 2 * start + size + at, mask=inside, other=0.0).to(tl.float32)
    activated = (gate * tl.sigmoid(gate)).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + start + at, (activated * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotate_write_kernel(
    qkv_ptr, q_ptr, keys_ptr, values_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, positions_ptr, table_ptr, table_width, eps,
    heads: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr, half: tl.constexpr, padded: tl.constexpr,
    block: tl.constexpr, has_norm: tl.constexpr,
):  # fmt: skip
    """One program for each row and head: turns q and k by their position, writes k and v to the cache, q to [B, H, D].

    `half`: rotated dimensions / 2; cos and sin are [positions, half]. A row whose table begins with -1 writes nothing.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, padded)
    inside = at < dim
    start = qkv_ptr + row.to(tl.int64) * (heads + 2 * kv_heads) * dim + head * dim
    x = tl.load(start + at, mask=inside, other=0.0).to(tl.float32)
    position = tl.load(positions_ptr + row)
    holder = tl.load(table_ptr + row * table_width + position // block)
    slot = (holder * block + position % block).to(tl.int64)
    dtype = qkv_ptr.dtype.element_ty
    if head >= heads + kv_heads:
        place = values_ptr + (slot * kv_heads + head - heads - kv_heads) * dim
        tl.store(place + at, x.to(values_ptr.dtype.element_ty), mask=inside & (holder >= 0))
    else:
        partner = tl.where(at < half, at + half, at - half)
        partner = tl.where(at < 2 * half, partner, at)
        other = tl.load(start + partner, mask=inside, other=0.0).to(tl.float32)
        if has_norm:
            inverse = 1.0 / tl.sqrt(tl.sum(x * x) / dim + eps)
            weights = q_norm_ptr if head < heads else k_norm_ptr
            x = (x * inverse * tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
            other = other * inverse * tl.load(weights + partner, mask=inside, other=0.0).to(tl.float32)
            other = other.to(dtype).to(tl.float32)
        turned = at < 2 * half
        angle = position * half + tl.where(at < half, at, at - half)
        cos = tl.load(cos_ptr + angle, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=turned, other=0.0).to(tl.float32)
        y = x * cos + tl.where(at < half, -other, other) * sin
        if head < heads:
            tl.store(q_ptr + (row.to(tl.int64) * heads + head) * dim + at, y.to(dtype), mask=inside)
        else:
            place = keys_ptr + (slot * kv_heads + head - heads) * dim
            tl.store(place + at, y.to(keys_ptr.dtype.element_ty), mask=inside & (holder >= 0))


@triton.jit
def attention_kernel(
    q_ptr, keys_ptr, values_ptr, positions_ptr, table_ptr, table_width, partial_ptr, stats_ptr, scale, window,
    heads: tl.constexpr, kv_heads: tl.constexpr, group: tl.constexpr, dim: tl.constexpr, padded: tl.constexpr,
    block: tl.constexpr, splits: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """One program for each row, key head and split of its positions (flash decoding): partial sums and their statistics.

    partial [B, H, splits, D] f32, stats [B, H, splits, 2] f32 (largest score, sum of exponentials).
    """
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(positions_ptr + row) + 1
    first = tl.maximum(0, length - window)
    share = tl.cdiv(tl.cdiv(length - first, splits), span) * span
    begin = first + split * share
    end = tl.minimum(length, begin + share)
    member, at = tl.arange(0, 16), tl.arange(0, padded)
    head = kv_head * group + member
    q_mask = (member[:, None] < group) & (at[None, :] < dim)
    q_place = q_ptr + (row.to(tl.int64) * heads + head[:, None]) * dim + at[None, :]
    q = tl.load(q_place, mask=q_mask, other=0.0)
    best = tl.full((16,), -1e30, tl.float32)
    total = tl.zeros((16,), tl.float32)
    sums = tl.zeros((16, padded), tl.float32)
    for start in range(begin, end, span):
        position = start + tl.arange(0, span)
        inside = position < end
        holder = tl.load(table_ptr + row * table_width + position // block, mask=inside, other=0)
        slot = (tl.maximum(holder, 0) * block + position % block).to(tl.int64)
        place = (slot[:, None] * kv_heads + kv_head) * dim + at[None, :]
        mask = inside[:, None] & (at[None, :] < dim)
        k = tl.load(keys_ptr + place, mask=mask, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, -1e30)
        larger = tl.maximum(best, tl.max(scores, 1))
        weights = tl.where(inside[None, :], tl.exp(scores - larger[:, None]), 0.0)
        shrink = tl.exp(best - larger)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(values_ptr + place, mask=mask, other=0.0).to(q.dtype)
        sums = sums * shrink[:, None] + tl.dot(weights.to(q.dtype), v, input_precision="ieee")
        best = larger
    out = (row.to(tl.int64) * heads + head) * splits + split
    tl.store(partial_ptr + out[:, None] * dim + at[None, :], sums, mask=q_mask)
    tl.store(stats_ptr + out * 2, best, mask=member < group)
    tl.store(stats_ptr + out * 2 + 1, total, mask=member < group)


@triton.jit
def combine_kernel(partial_ptr, stats_ptr, out_ptr, dim: tl.constexpr, padded: tl.constexpr, splits: tl.constexpr):
    """One program for each row and head: the splits of `attention_kernel` put together, out [B, H, D]."""
    place = tl.program_id(0).to(tl.int64)
    split, at = tl.arange(0, splits), tl.arange(0, padded)
    best = tl.load(stats_ptr + (place * splits + split) * 2)
    total = tl.load(stats_ptr + (place * splits + split) * 2 + 1)
    weights = tl.where(total > 0, tl.exp(best - tl.max(best, 0)), 0.0)
    parts = tl.load(partial_ptr + (place * splits + split[:, None]) * dim + at[None, :], mask=at[None, :] < dim, other=0.0)
    summed = tl.sum(parts * weights[:, None], 0) / tl.sum(total * weights, 0)
    tl.store(out_ptr + place * dim + at, summed.to(out_ptr.dtype.element_ty), mask=at < dim)
