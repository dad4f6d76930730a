"""The attention of a decode step as one Triton kernel: queries and keys are turned, the cache is written, positions are
attended to in splits (flash decoding), and the program that finishes last puts the splits together. Prompts have the turning
and writing as a kernel of its own, and attend in PyTorch.

B rows of a batch, H query heads in groups of G that share one of KVH key heads, D dimensions a head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cake_llama.cuda.kernels import launch_next, load_parts, wait_for_last

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
# Triton compiles these functions from their source: annotations other than constexpr would change what they mean.


@triton.jit
def _turned(
    qkv_ptr, start, at, mask, norm_ptr, angle, cos_ptr, sin_ptr, eps, stride,
    dim: tl.constexpr, half: tl.constexpr, parts: tl.constexpr, has_norm: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Heads [n, D] normed, if they are to be, and turned by their position; start [n, 1], at [1, D]."""
    partner = tl.where(at < half, at + half, at - half)
    partner = tl.where(at < 2 * half, partner, at)
    x = load_parts(qkv_ptr + start + at, mask, stride, parts).to(dtype).to(tl.float32)
    other = load_parts(qkv_ptr + start + partner, mask, stride, parts).to(dtype).to(tl.float32)
    if has_norm:
        inverse = (1.0 / tl.sqrt(tl.sum(x * x, 1) / dim + eps))[:, None]
        x = (x * inverse * tl.load(norm_ptr + at, mask=at < dim, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
        other = other * inverse * tl.load(norm_ptr + partner, mask=at < dim, other=0.0).to(tl.float32)
        other = other.to(dtype).to(tl.float32)
    turned = at < 2 * half
    place = angle * half + tl.where(at < half, at, at - half)
    cos = tl.load(cos_ptr + place, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + place, mask=turned, other=0.0).to(tl.float32)
    return (x * cos + tl.where(at < half, -other, other) * sin).to(dtype)


@triton.jit
def turn_kernel(
    qkv_ptr, keys_ptr, values_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, places_ptr, out_ptr, eps, total,
    heads: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr, half: tl.constexpr, padded: tl.constexpr,
    members: tl.constexpr, has_norm: tl.constexpr, pdl: tl.constexpr,
):  # fmt: skip
    """One program for each position and key head: turns what of qkv [T, H + 2 KVH, D] belongs to it, queries to
    out [T, H, D], key and value to their slot. `places` i32 [2, T]: positions, slots. `half`, `members` as below."""
    launch_next(pdl)
    wait_for_last(pdl)
    row, kv_head = tl.program_id(0), tl.program_id(1)
    group: tl.constexpr = heads // kv_heads
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    position = tl.load(places_ptr + row)
    slot = tl.load(places_ptr + total + row).to(tl.int64)
    member, at = tl.arange(0, members)[:, None], tl.arange(0, padded)[None, :]
    mask = (member < group) & (at < dim)
    base = row.to(tl.int64) * (heads + 2 * kv_heads) * dim
    q = _turned(
        qkv_ptr, base + (kv_head * group + member) * dim, at, mask, q_norm_ptr, position, cos_ptr, sin_ptr, eps, 0,
        dim, half, 1, has_norm, dtype,
    )  # fmt: skip
    tl.store(out_ptr + (row.to(tl.int64) * heads + kv_head * group + member) * dim + at, q, mask=mask)
    own = base + heads * dim + kv_head * dim + tl.zeros((1, 1), tl.int32)
    key = _turned(qkv_ptr, own, at, at < dim, k_norm_ptr, position, cos_ptr, sin_ptr, eps, 0, dim, half, 1, has_norm, dtype)
    value = tl.load(qkv_ptr + own + kv_heads * dim + at, mask=at < dim)
    new = (slot * kv_heads + kv_head) * dim + at
    tl.store(keys_ptr + new, key.to(keys_ptr.dtype.element_ty), mask=at < dim)
    tl.store(values_ptr + new, value.to(values_ptr.dtype.element_ty), mask=at < dim)


@triton.jit
def _attend_cached(
    q, keys_ptr, values_ptr, row_table, begin, end, kv_head, scale,
    kv_heads: tl.constexpr, dim: tl.constexpr, padded: tl.constexpr, block: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """Positions begin .. end - 1: (largest score, sum of exponentials, weighted values) for each of 16 queries."""
    at = tl.arange(0, padded)[None, :]
    dtype: tl.constexpr = q.dtype
    best = tl.full((16,), -1e30, tl.float32)
    total = tl.zeros((16,), tl.float32)
    sums = tl.zeros((16, padded), tl.float32)
    for start in range(begin, end, span):
        places = start + tl.arange(0, span)
        inside = places < end
        holder = tl.load(row_table + places // block, mask=inside, other=0)
        slot = (tl.maximum(holder, 0) * block + places % block).to(tl.int64)
        place = (slot[:, None] * kv_heads + kv_head) * dim + at
        mask = inside[:, None] & (at < dim)
        k = tl.load(keys_ptr + place, mask=mask, other=0.0).to(dtype)
        v = tl.load(values_ptr + place, mask=mask, other=0.0).to(dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, -1e30)
        larger = tl.maximum(best, tl.max(scores, 1))
        weights = tl.where(inside[None, :], tl.exp(scores - larger[:, None]), 0.0)
        shrink = tl.exp(best - larger)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(dtype), v, input_precision="ieee")
        best = larger
    return best, total, sums


@triton.jit
def _attend_new(q, key, value, scale, best, total, sums):
    """One more position, its key and value [1, D]."""
    score = tl.sum(q.to(tl.float32) * key.to(tl.float32), 1) * scale
    larger = tl.maximum(best, score)
    shrink, weight = tl.exp(best - larger), tl.exp(score - larger)
    return larger, total * shrink + weight, sums * shrink[:, None] + weight[:, None] * value.to(tl.float32)


@triton.jit
def attention_kernel(
    qkv_ptr, keys_ptr, values_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, inputs_ptr, table_ptr, table_width,
    partial_ptr, stats_ptr, counters_ptr, out_ptr, eps, scale, window,
    batch: tl.constexpr, heads: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr, half: tl.constexpr,
    padded: tl.constexpr, block: tl.constexpr, splits: tl.constexpr, span: tl.constexpr, parts: tl.constexpr,
    members: tl.constexpr, has_norm: tl.constexpr, pdl: tl.constexpr,
):  # fmt: skip
    """One program for each row, key head and split of its positions; out [B, H, D].

    `half`: rotated dimensions / 2; cos and sin are [positions, half]. `inputs` i32 [B, 3] has the position second and third
    which table is the row's. A row whose table begins with -1 writes nothing. partial [B, H, splits, D] f32, stats
    [B, H, splits, 2] f32 (largest score, sum of exponentials), counters i32 [B, KVH], zero before and after. `members`: G, up
    to a power of two.
    """
    launch_next(pdl)
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = heads // kv_heads
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    position = tl.load(inputs_ptr + 3 * row + 1)
    first = tl.maximum(0, position + 1 - window)
    # A split of one span has too little to do for what putting it together costs.
    share = tl.maximum(2, tl.cdiv(tl.cdiv(position + 1 - first, splits), span)) * span
    active = tl.cdiv(position + 1 - first, share)
    if split >= active:
        return
    begin = first + split * share
    end = tl.minimum(position, begin + share)
    wait_for_last(pdl)
    member, at = tl.arange(0, 16), tl.arange(0, padded)[None, :]
    head = kv_head * group + member
    q_mask = (member[:, None] < group) & (at < dim)
    stride = batch * (heads + 2 * kv_heads) * dim
    base = row.to(tl.int64) * (heads + 2 * kv_heads) * dim
    q = _turned(
        qkv_ptr, base + head[:, None] * dim, at, q_mask, q_norm_ptr, position, cos_ptr, sin_ptr, eps, stride,
        dim, half, parts, has_norm, dtype,
    )  # fmt: skip
    q = tl.where(q_mask, q, 0.0).to(dtype)
    row_table = table_ptr + tl.load(inputs_ptr + 3 * row + 2) * table_width
    best, total, sums = _attend_cached(
        q, keys_ptr, values_ptr, row_table, begin, end, kv_head, scale, kv_heads, dim, padded, block, span
    )
    if (begin <= position) & (position < begin + share):
        # The split that the new position falls to writes its key and value, and attends to them without reading them back.
        own = base + heads * dim + kv_head * dim + tl.zeros((1, 1), tl.int32)
        key = _turned(
            qkv_ptr, own, at, at < dim, k_norm_ptr, position, cos_ptr, sin_ptr, eps, stride,
            dim, half, parts, has_norm, dtype,
        )  # fmt: skip
        value = load_parts(qkv_ptr + own + kv_heads * dim + at, at < dim, stride, parts).to(dtype)
        last = tl.load(row_table + position // block)
        new = ((last * block + position % block).to(tl.int64) * kv_heads + kv_head) * dim + at
        tl.store(keys_ptr + new, key.to(keys_ptr.dtype.element_ty), mask=(at < dim) & (last >= 0))
        tl.store(values_ptr + new, value.to(values_ptr.dtype.element_ty), mask=(at < dim) & (last >= 0))
        best, total, sums = _attend_new(
            q, tl.where(at < dim, key, 0.0), tl.where(at < dim, value, 0.0), scale, best, total, sums
        )
    if splits == 1:
        place = (row.to(tl.int64) * heads + head[:, None]) * dim + at
        tl.store(out_ptr + place, (sums / total[:, None]).to(dtype), mask=q_mask)
    else:
        out = (row.to(tl.int64) * heads + head) * splits + split
        tl.store(partial_ptr + out[:, None] * dim + at, sums, mask=q_mask)
        tl.store(stats_ptr + out * 2, best, mask=member < group)
        tl.store(stats_ptr + out * 2 + 1, total, mask=member < group)
        tl.debug_barrier()  # every thread's part is written before one of them says so
        counter = counters_ptr + row * kv_heads + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel") == active - 1:
            tl.debug_barrier()
            tl.store(counter, 0)
            first_head = row.to(tl.int64) * heads + kv_head * group
            _combine(partial_ptr, stats_ptr, out_ptr, first_head, active, group, members, dim, padded, splits)


@triton.jit
def _combine(
    partial_ptr, stats_ptr, out_ptr, first, active, group: tl.constexpr, members: tl.constexpr, dim: tl.constexpr,
    padded: tl.constexpr, splits: tl.constexpr,
):  # fmt: skip
    """The splits of a group of heads from `first` on put together. What other programs wrote is read past the first cache,
    which may be stale; no read waits for another."""
    member, at, split = tl.arange(0, members), tl.arange(0, padded), tl.arange(0, splits)
    head = first + member
    place = head[None, :] * splits + split[:, None]
    there = (member < group)[None, :] & (split < active)[:, None]
    best = tl.load(stats_ptr + place * 2, mask=there, other=-1e30, cache_modifier=".cg")
    most = tl.max(best, 0)
    chunk: tl.constexpr = min(splits, 8)
    totals, sums = tl.zeros((chunk, members), tl.float32), tl.zeros((chunk, members, padded), tl.float32)
    for start in tl.static_range(0, splits, chunk):
        number = start + tl.arange(0, chunk)[:, None]
        part = head[None, :] * splits + number
        inside = (member < group)[None, :] & (number < active)
        weight = tl.exp(tl.load(stats_ptr + part * 2, mask=inside, other=-1e30, cache_modifier=".cg") - most[None, :])
        totals += weight * tl.load(stats_ptr + part * 2 + 1, mask=inside, other=0.0, cache_modifier=".cg")
        values = tl.load(
            partial_ptr + part[:, :, None] * dim + at[None, None, :], mask=inside[:, :, None] & (at < dim)[None, None, :],
            other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        sums += weight[:, :, None] * values
    result = tl.sum(sums, 0) / tl.where(member < group, tl.sum(totals, 0), 1.0)[:, None]
    mask = (member < group)[:, None] & (at < dim)[None, :]
    tl.store(out_ptr + head[:, None] * dim + at[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)
