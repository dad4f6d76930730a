"""A row times narrow weights, as Triton kernels: what a decode step at batch 1 consists of.

Of 4 and 8 bits four products are one instruction (dp4a), on activations of 8 bits with a scale a group, as the CPU's kernels
have them; with f32 the arithmetic units, not the memory, would be the limit. 5 and 6 bits are multiplied in f32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cake_llama.cuda.kernels import launch_next, wait_for_last
from cake_llama.cuda.narrow_kernels import floats, half_of, scale_and_rest

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
# Triton compiles these functions from their source: annotations other than constexpr would change what they mean.


@triton.jit
def _rows(rows_total, rows: tl.constexpr, gated: tl.constexpr):
    """The rows of a program; gated: rows / 2 of the first half of the matrix, each followed by its like of the second."""
    index = tl.arange(0, rows)
    if gated:
        row = tl.program_id(0) * (rows // 2) + index // 2 + (index % 2) * (rows_total // 2)
    else:
        row = tl.program_id(0) * rows + index
    return row


@triton.jit
def _load(codes_ptr, scales_ptr, row, start, groups, rows_total, block: tl.constexpr, width: tl.constexpr):
    """Words [block, rows, width] and scales [block, rows] of the groups from `start` on: a thread has whole groups."""
    group = start + tl.arange(0, block)
    at = row[None, :].to(tl.int64) * groups + group[:, None]
    mask = (row[None, :] < rows_total) & (group[:, None] < groups)
    words = tl.load(codes_ptr + at[:, :, None] * width + tl.arange(0, width)[None, None, :], mask=mask[:, :, None], other=0)
    return words, tl.load(scales_ptr + at, mask=mask, other=0)


@triton.jit
def _x_at(x_ptr, norm_ptr, at, inside, has_norm: tl.constexpr):
    """(x, x with the weights of the norm)"""
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if has_norm:
        return x, x * tl.load(norm_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return x, x


@triton.jit
def narrow_matvec_kernel(
    x_ptr, norm_ptr, codes_ptr, high_ptr, scales_ptr, bias_ptr, residual_ptr, out_ptr, eps, rows_total, one,
    groups: tl.constexpr, rows: tl.constexpr, block: tl.constexpr, width: tl.constexpr,
    bits: tl.constexpr, symmetric: tl.constexpr, gated: tl.constexpr, has_norm: tl.constexpr, has_bias: tl.constexpr,
    has_residual: tl.constexpr, pdl: tl.constexpr,
):  # fmt: skip
    """out[n] = sum_k w[n, k] * norm(x)[k] (+ bias[n]) (+ residual[n]).

    gated: out[n] = silu(w[n] . norm(x)) * (w[n + rows_total / 2] . norm(x)); then the program has rows / 2 of each half.
    """
    launch_next(pdl)
    row = _rows(rows_total, rows, gated)
    words, scale_words = _load(codes_ptr, scales_ptr, row, 0, groups, rows_total, block, width)
    wait_for_last(pdl)
    sums, squares = tl.zeros((block, rows), tl.float32), tl.zeros((block, width), tl.float32)
    j = tl.arange(0, width)
    halves: tl.constexpr = 2 if symmetric else 1
    planes: tl.constexpr = 32 // width // halves
    for start in tl.static_range(0, groups, block):
        if start + block < groups:
            next_words, next_scales = _load(codes_ptr, scales_ptr, row, start + block, groups, rows_total, block, width)
        group = start + tl.arange(0, block)
        high_at = (row[None, :].to(tl.int64) * groups + tl.minimum(group, groups - 1)[:, None])[:, :, None]
        inside = (group < groups)[:, None]
        base = group[:, None] * 32 + j[None, :]
        for half in tl.static_range(halves):
            dots, total = tl.zeros((block, rows, width), tl.float32), tl.zeros((block, width), tl.float32)
            for plane in tl.static_range(half * planes, (half + 1) * planes):
                raw, x = _x_at(x_ptr, norm_ptr, base + plane * width, inside, has_norm)
                squares += raw * raw
                total += x
                dots += floats(words, high_ptr, high_at, j[None, None, :], one, plane, width, bits) * x[:, None, :]
            scale, rest = scale_and_rest(scale_words, half, bits, bits, symmetric)
            sums += tl.sum(dots, 2) * scale + rest * tl.sum(total, 1)[:, None]
        if start + block < groups:
            words, scale_words = next_words, next_scales
    result = tl.sum(sums, 0)
    if has_norm:
        result *= 1.0 / tl.sqrt(tl.sum(squares) / (groups * 32) + eps)
    _finish(
        result, row, bias_ptr, residual_ptr, out_ptr, rows_total, x_ptr.dtype.element_ty, rows, gated, has_bias, has_residual
    )


@triton.jit
def _dot4(a, b, sums, emulated: tl.constexpr):
    """sums + the products of four unsigned bytes of a with four signed ones of b."""
    if emulated:
        for byte in tl.static_range(4):
            sums += ((a >> (8 * byte)) & 255) * ((b << (24 - 8 * byte)) >> 24)
        return sums
    return tl.inline_asm_elementwise(
        "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, sums], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _packed(
    x_ptr, norm_ptr, base, inside, inverse, step: tl.constexpr, half: tl.constexpr, width: tl.constexpr,
    symmetric: tl.constexpr, has_norm: tl.constexpr,
):  # fmt: skip
    """round(x * inverse) of four planes as the bytes of a word, in the order of a word's codes; symmetric: of those planes
    that lie in one half of a group, and zero for the others."""
    steps: tl.constexpr = 8 // width
    packed = tl.zeros(base.shape, tl.int32)
    for byte in tl.static_range(4):
        if not symmetric or (steps * byte + step) * width // 16 == half:
            _, x = _x_at(x_ptr, norm_ptr, base + (steps * byte + step) * width, inside, has_norm)
            # Added to 1.5 * 2^23, a float has its rounded value as last bits.
            rounded = (x * inverse + 12582912.0).to(tl.int32, bitcast=True) & 255
            packed = packed | (rounded << (8 * byte))
    return packed


@triton.jit
def narrow_matvec8_kernel(
    x_ptr, norm_ptr, codes_ptr, scales_ptr, bias_ptr, residual_ptr, out_ptr, eps, rows_total,
    groups: tl.constexpr, rows: tl.constexpr, block: tl.constexpr, width: tl.constexpr,
    bits: tl.constexpr, symmetric: tl.constexpr, gated: tl.constexpr, has_norm: tl.constexpr, has_bias: tl.constexpr,
    has_residual: tl.constexpr, pdl: tl.constexpr, emulated: tl.constexpr,
):  # fmt: skip
    """`narrow_matvec_kernel` with activations of 8 bits, a scale a group, as the CPU's kernels have them; 4 and 8 bits."""
    launch_next(pdl)
    row = _rows(rows_total, rows, gated)
    words, scale_words = _load(codes_ptr, scales_ptr, row, 0, groups, rows_total, block, width)
    wait_for_last(pdl)
    sums, squares = tl.zeros((block, rows), tl.float32), tl.zeros((block, width), tl.float32)
    j = tl.arange(0, width)
    planes: tl.constexpr = 32 // width
    steps: tl.constexpr = 8 // width
    for start in tl.static_range(0, groups, block):
        if start + block < groups:
            next_words, next_scales = _load(codes_ptr, scales_ptr, row, start + block, groups, rows_total, block, width)
        group = start + tl.arange(0, block)
        inside = (group < groups)[:, None]
        base = group[:, None] * 32 + j[None, :]
        largest = tl.zeros((block, width), tl.float32)
        for plane in tl.static_range(planes):
            raw, x = _x_at(x_ptr, norm_ptr, base + plane * width, inside, has_norm)
            squares += raw * raw
            largest = tl.maximum(largest, tl.abs(x))
        x_scale = tl.maximum(tl.max(largest, 1) / 127.0, 1e-30)
        inverse = (1.0 / x_scale)[:, None]
        for half in tl.static_range(2 if symmetric else 1):
            dots, total = tl.zeros((block, rows, width), tl.int32), tl.zeros((block, width), tl.int32)
            for step in tl.static_range(steps):
                packed = _packed(x_ptr, norm_ptr, base, inside, inverse, step, half, width, symmetric, has_norm)
                codes = ((words >> (4 * step)) & 0x0F0F0F0F) if width == 4 else words
                dots = _dot4(codes, packed[:, None, :], dots, emulated)
                total = _dot4(0x01010101, packed, total, emulated)
            dot = tl.sum(dots, 2).to(tl.float32) * x_scale[:, None]
            all_x = (tl.sum(total, 1).to(tl.float32) * x_scale)[:, None]
            if symmetric:
                sums += (dot - (1 << (bits - 1)) * all_x) * half_of(scale_words, half == 1)
            else:
                sums += dot * half_of(scale_words, False) + all_x * half_of(scale_words, True)
        if start + block < groups:
            words, scale_words = next_words, next_scales
    result = tl.sum(sums, 0)
    if has_norm:
        result *= 1.0 / tl.sqrt(tl.sum(squares) / (groups * 32) + eps)
    _finish(
        result, row, bias_ptr, residual_ptr, out_ptr, rows_total, x_ptr.dtype.element_ty, rows, gated, has_bias, has_residual
    )


@triton.jit
def _finish(
    result, row, bias_ptr, residual_ptr, out_ptr, rows_total, dtype: tl.constexpr, rows: tl.constexpr, gated: tl.constexpr,
    has_bias: tl.constexpr, has_residual: tl.constexpr,
):  # fmt: skip
    """What stands after a product, and its store."""
    if gated:
        gate, up = tl.split(tl.reshape(result, (rows // 2, 2)))
        gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
        activated = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
        out_row = tl.program_id(0) * (rows // 2) + tl.arange(0, rows // 2)
        tl.store(out_ptr + out_row, (activated * up).to(dtype), mask=out_row < rows_total // 2)
    else:
        inside_rows = row < rows_total
        if has_bias:
            result += tl.load(bias_ptr + row, mask=inside_rows, other=0.0).to(tl.float32)
        if has_residual:
            result = result.to(dtype).to(tl.float32) + tl.load(residual_ptr + row, mask=inside_rows, other=0.0).to(tl.float32)
        tl.store(out_ptr + row, result.to(out_ptr.dtype.element_ty), mask=inside_rows)
