"""Triton kernels on narrow weights (`cake_llama.narrow_matrix`): codes become floats in registers, and only there.

A code is put into the mantissa of a float between 1 and 2, which costs a shift and one logical operation where a conversion
would run at a quarter of the rate: v = 1 + q / 2^e. What that adds is taken off a group at a time:
sum(x (q s + m)) = s 2^e sum(x v) + (m - s 2^e) sum(x).
"""

from __future__ import annotations

import triton
import triton.language as tl

from cake_llama.cuda.kernels import launch_next, wait_for_last

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
# Triton compiles these functions from their source: annotations other than constexpr would change what they mean.


@triton.jit
def _moved(words, place: tl.constexpr, to: tl.constexpr):
    """Bits from `place` on, moved to `to` on."""
    if place < to:
        return words << (to - place)
    return words >> (place - to)


@triton.jit
def floats(words, high_ptr, high_at, j, one, plane: tl.constexpr, width: tl.constexpr, bits: tl.constexpr):
    """1 + q / 2^e of the codes in one plane of `words`: columns width * plane + j of their groups; e as `_exponent` says.

    `high_at`: where a group's words of fifth and sixth bits begin, of a shape that spreads over that of `words`. `one`: the
    bits of 1.0, which come as an argument because the assembler makes two operations of a mask and an `or` it knows.
    """
    low: tl.constexpr = width
    exponent: tl.constexpr = _exponent(plane, bits)
    # Of 4 bits two neighbours lie in one mantissa, so that one shift serves both.
    moved = _moved(words, (plane - plane % 2) * width, 15) if bits == 4 else _moved(words, plane * width, 23 - bits)
    mantissa = moved & (((1 << low) - 1) << (23 - exponent))
    if bits == 5:
        high = tl.load(high_ptr + high_at)
        mantissa = mantissa | (((high >> (4 * plane + j)) & 1) << 22)
    if bits == 6:
        high = tl.load(high_ptr + 2 * high_at + plane // 4)
        mantissa = mantissa | (((high >> (2 * (4 * (plane % 4) + j))) & 3) << 21)
    return (mantissa | one).to(tl.float32, bitcast=True)


@triton.constexpr_function
def _exponent(plane, bits):
    return 8 if bits == 4 and plane % 2 == 0 else bits


@triton.jit
def half_of(words, upper: tl.constexpr):
    """The f16 in one half of each word, as f32."""
    bits = words >> 16 if upper else words
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def scale_and_rest(words, half: tl.constexpr, exponent: tl.constexpr, bits: tl.constexpr, symmetric: tl.constexpr):
    """(s 2^e, m - s 2^e) of a group or, where it is symmetric about 2^(bits - 1), of each half of it."""
    if symmetric:
        scale = half_of(words, half == 1)
        least = scale * -(1 << (bits - 1))
    else:
        scale = half_of(words, False)
        least = half_of(words, True)
    return scale * (1 << exponent), least - scale * (1 << exponent)


@triton.jit
def _weights(
    words, scale_words, high_ptr, high_at, j, one, plane: tl.constexpr, width: tl.constexpr, bits: tl.constexpr,
    symmetric: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The weights of one plane, in the shape of `words`."""
    scale, rest = scale_and_rest(scale_words, plane * width // 16, _exponent(plane, bits), bits, symmetric)
    return (floats(words, high_ptr, high_at, j, one, plane, width, bits) * scale + rest).to(dtype)


@triton.jit
def _tile(
    words, scale_words, high_ptr, high_at, j, one, rows: tl.constexpr, block: tl.constexpr, width: tl.constexpr,
    bits: tl.constexpr, symmetric: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The weights of words [rows, block, width] in their order, [rows, block * 32]: a thread has all columns of its groups, so
    that putting the planes beside one another moves nothing."""
    w0 = _weights(words, scale_words, high_ptr, high_at, j, one, 0, width, bits, symmetric, dtype)
    w1 = _weights(words, scale_words, high_ptr, high_at, j, one, 1, width, bits, symmetric, dtype)
    w2 = _weights(words, scale_words, high_ptr, high_at, j, one, 2, width, bits, symmetric, dtype)
    w3 = _weights(words, scale_words, high_ptr, high_at, j, one, 3, width, bits, symmetric, dtype)
    if width == 8:
        planes = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    else:
        w4 = _weights(words, scale_words, high_ptr, high_at, j, one, 4, width, bits, symmetric, dtype)
        w5 = _weights(words, scale_words, high_ptr, high_at, j, one, 5, width, bits, symmetric, dtype)
        w6 = _weights(words, scale_words, high_ptr, high_at, j, one, 6, width, bits, symmetric, dtype)
        w7 = _weights(words, scale_words, high_ptr, high_at, j, one, 7, width, bits, symmetric, dtype)
        even, odd = tl.join(tl.join(w0, w4), tl.join(w2, w6)), tl.join(tl.join(w1, w5), tl.join(w3, w7))
        planes = tl.join(even, odd)
    return tl.reshape(tl.permute(tl.reshape(planes, (rows, block, width, 32 // width)), (0, 1, 3, 2)), (rows, block * 32))


@triton.jit
def narrow_matmul_kernel(
    x_ptr, codes_ptr, high_ptr, scales_ptr, out_ptr, rows_total, batch, out_rows, one,
    groups: tl.constexpr, padded_batch: tl.constexpr, rows: tl.constexpr, block: tl.constexpr, share: tl.constexpr,
    width: tl.constexpr, bits: tl.constexpr, symmetric: tl.constexpr, pdl: tl.constexpr,
):  # fmt: skip
    """out[split, b, n] = sum of w[n, k] x[b, k] over the split's `share` of the groups; f32, whoever reads it adds the splits.
    `out_rows`: what a row of out has, more than rows_total where this is one product of several side by side.
    """
    launch_next(pdl)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    first = tl.program_id(1) * share
    member, j = tl.arange(0, padded_batch), tl.arange(0, width)
    inside_rows = (row < rows_total)[:, None]
    wait_for_last(pdl)
    sums = tl.zeros((rows, padded_batch), tl.float32)
    for start in range(first, tl.minimum(first + share, groups), block):
        group = start + tl.arange(0, block)
        at = row[:, None].to(tl.int64) * groups + group[None, :]
        mask = inside_rows & (group < groups)[None, :]
        words = tl.load(codes_ptr + at[:, :, None] * width + j[None, None, :], mask=mask[:, :, None], other=0)
        scale_words = tl.load(scales_ptr + at, mask=mask, other=0)[:, :, None]
        column = start * 32 + tl.arange(0, block * 32)
        x_mask = (column < groups * 32)[:, None] & (member[None, :] < batch)
        x = tl.load(x_ptr + member[None, :] * (groups * 32) + column[:, None], mask=x_mask, other=0.0)
        high_at = tl.where(mask, at, 0)[:, :, None]
        w = _tile(words, scale_words, high_ptr, high_at, j[None, None, :], one, rows, block, width, bits, symmetric, x.dtype)
        sums = tl.dot(w, x, sums, input_precision="ieee")
    out = (tl.program_id(1) * batch + member[None, :]).to(tl.int64) * out_rows + row[:, None]
    tl.store(out_ptr + out, sums, mask=inside_rows & (member[None, :] < batch))


@triton.jit
def unpack_kernel(
    codes_ptr, high_ptr, scales_ptr, index_ptr, out_ptr, groups, one, block: tl.constexpr, width: tl.constexpr,
    bits: tl.constexpr, symmetric: tl.constexpr, has_index: tl.constexpr,
):  # fmt: skip
    """One program for each row and `block` groups: row index[i], or i, as weights of out's type, out [i, columns]."""
    i = tl.program_id(0)
    row = tl.load(index_ptr + i).to(tl.int64) if has_index else i.to(tl.int64)
    group = tl.program_id(1) * block + tl.arange(0, block)
    j = tl.arange(0, width)
    inside = group < groups
    at = row * groups + group
    words = tl.load(codes_ptr + at[:, None] * width + j[None, :], mask=inside[:, None], other=0)
    scale_words = tl.load(scales_ptr + at, mask=inside, other=0)[:, None]
    high_at = tl.where(inside, at, row * groups)[:, None]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    for plane in tl.static_range(32 // width):
        w = _weights(words, scale_words, high_ptr, high_at, j[None, :], one, plane, width, bits, symmetric, dtype)
        place = (i.to(tl.int64) * groups + group)[:, None] * 32 + plane * width + j[None, :]
        tl.store(out_ptr + place, w, mask=inside[:, None])
