"""Triton kernels of a decode step. At batch 1 a step is a walk through the weights, so each product reads its matrix once at
the memory's speed and does its neighbours' work on the way: the norm before it, the residual, the gated activation after it.

Sums are in f32; what crosses a kernel is in the model's dtype. A norm divides by one number, which is known when all of the
vector has been read: that is done to the result, so that no product waits for it.

`pdl`: programmatic dependent launch. A kernel starts while the one before it still runs and reads weights, which nobody
writes, until it has to wait for what that one computes.
"""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
# Triton compiles these functions from their source: annotations other than constexpr would change what they mean.

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an older Triton

    @triton.jit
    def gdc_launch_dependents():
        pass

    @triton.jit
    def gdc_wait():
        pass

    HAS_PDL = False
else:
    HAS_PDL = True


@triton.jit
def launch_next(pdl: tl.constexpr):
    if pdl:
        gdc_launch_dependents()


@triton.jit
def wait_for_last(pdl: tl.constexpr):
    """Nothing that an earlier kernel writes may be read, and nothing it reads be written, before this."""
    if pdl:
        gdc_wait()


@triton.jit
def load_parts(place, mask, stride, parts: tl.constexpr):
    """The sum of what lies at `place` in each of `parts` tensors: the splits of a product, in f32, or one value."""
    value = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, parts):
        value += tl.load(place + part * stride, mask=mask, other=0.0)
    return value


@triton.jit
def _columns(place, row, start, rows_total, size: tl.constexpr, block: tl.constexpr):
    at = start + tl.arange(0, block)
    return tl.load(place + at[None, :], mask=(row[:, None] < rows_total) & (at[None, :] < size), other=0.0)


@triton.jit
def matvec_kernel(
    x_ptr, norm_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, eps, rows_total,
    size: tl.constexpr, rows: tl.constexpr, block: tl.constexpr,
    has_norm: tl.constexpr, has_bias: tl.constexpr, has_residual: tl.constexpr, pdl: tl.constexpr,
):  # fmt: skip
    """out[n] = sum_k w[n, k] * norm(x)[k] (+ bias[n]) (+ residual[n]); w is [rows_total, size]."""
    launch_next(pdl)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    place = w_ptr + row[:, None].to(tl.int64) * size
    w = _columns(place, row, 0, rows_total, size, block)
    wait_for_last(pdl)
    sums, squares = tl.zeros((rows, block), tl.float32), tl.zeros((block,), tl.float32)
    for start in range(0, size, block):
        at = start + tl.arange(0, block)
        x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        if has_norm:
            squares += x * x
            x *= tl.load(norm_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        following = _columns(place, row, start + block, rows_total, size, block)
        sums += w.to(tl.float32) * x[None, :]
        w = following
    result = tl.sum(sums, 1)
    if has_norm:
        result /= tl.sqrt(tl.sum(squares) / size + eps)
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
    size: tl.constexpr, rows: tl.constexpr, block: tl.constexpr, pdl: tl.constexpr,
):  # fmt: skip
    """out[n] = silu(w[n] . norm(x)) * (w[n + rows_total] . norm(x)); w is [2 * rows_total, size], gate above up."""
    launch_next(pdl)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    gates = w_ptr + row[:, None].to(tl.int64) * size
    ups = gates + rows_total.to(tl.int64) * size
    gate_w, up_w = _columns(gates, row, 0, rows_total, size, block), _columns(ups, row, 0, rows_total, size, block)
    wait_for_last(pdl)
    squares = tl.zeros((block,), tl.float32)
    gate_sums = tl.zeros((rows, block), tl.float32)
    up_sums = tl.zeros((rows, block), tl.float32)
    for start in range(0, size, block):
        at = start + tl.arange(0, block)
        x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        squares += x * x
        x *= tl.load(norm_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        next_gate = _columns(gates, row, start + block, rows_total, size, block)
        next_up = _columns(ups, row, start + block, rows_total, size, block)
        gate_sums += gate_w.to(tl.float32) * x[None, :]
        up_sums += up_w.to(tl.float32) * x[None, :]
        gate_w, up_w = next_gate, next_up
    dtype = x_ptr.dtype.element_ty
    inverse = 1.0 / tl.sqrt(tl.sum(squares) / size + eps)
    gate = (tl.sum(gate_sums, 1) * inverse).to(dtype).to(tl.float32)
    up = (tl.sum(up_sums, 1) * inverse).to(dtype).to(tl.float32)
    activated = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
    tl.store(out_ptr + row, (activated * up).to(dtype), mask=row < rows_total)


@triton.jit
def add_norm_kernel(
    x_ptr, delta_ptr, norm_ptr, out_ptr, eps, stride,
    size: tl.constexpr, padded: tl.constexpr, parts: tl.constexpr, pdl: tl.constexpr,
):  # fmt: skip
    """One program a row: x += delta (of `parts` tensors, 0 for none), written back; out = norm(x). For batches above 1."""
    launch_next(pdl)
    wait_for_last(pdl)
    at = tl.arange(0, padded)
    start = tl.program_id(0).to(tl.int64) * size
    inside = at < size
    x = tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
    if parts:
        dtype = x_ptr.dtype.element_ty
        x = (x + load_parts(delta_ptr + start + at, inside, stride, parts).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        tl.store(x_ptr + start + at, x.to(x_ptr.dtype.element_ty), mask=inside)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x) / size + eps)
    weight = tl.load(norm_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + at, (x * inverse * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul_kernel(gate_up_ptr, out_ptr, size, stride, block: tl.constexpr, parts: tl.constexpr, pdl: tl.constexpr):
    """out[b] = silu(gate[b]) * up[b] for gate_up [B, 2 * size], of `parts` tensors."""
    launch_next(pdl)
    wait_for_last(pdl)
    dtype = out_ptr.dtype.element_ty
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < size
    start = tl.program_id(0).to(tl.int64) * size
    gate = load_parts(gate_up_ptr + 2 * start + at, inside, stride, parts).to(dtype).to(tl.float32)
    up = load_parts(gate_up_ptr + 2 * start + size + at, inside, stride, parts).to(dtype).to(tl.float32)
    activated = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
    tl.store(out_ptr + start + at, (activated * up).to(dtype), mask=inside)
