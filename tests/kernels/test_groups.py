"""Group-wise 4 and 8 bit weights, (code - zero) * scale, and 8-bit floats."""

from __future__ import annotations

import numpy as np
import pytest
from tests.kernels.weights import Weights, activation_bound, address, aligned, product

import cake_kernels as kernels


@pytest.mark.parametrize("kind", ["G4", "G8"])
@pytest.mark.parametrize(("rows", "cols", "group"), [(16, 128, 32), (35, 320, 128), (64, 256, 64), (8, 96, 96)])
def test_group_wise_product_and_rows(isa: str, kind: str, rows: int, cols: int, group: int) -> None:
    """The last group of a row may be short (320 = 2 * 128 + 64)."""
    rng = np.random.default_rng(rows + group)
    top, heads = (16 if kind == "G4" else 256), -(-cols // group)
    codes = rng.integers(0, top, (rows, cols), dtype=np.uint8)
    zeros = rng.integers(0, top, (rows, heads), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.01, (rows, heads)).astype(np.float16)
    spread = np.repeat(np.arange(heads), group)[:cols]
    w = (codes.astype(np.float64) - zeros[:, spread]) * scales[:, spread].astype(np.float64)
    weights = Weights(kind, aligned(kernels.packed_bytes(kind, rows, cols, group)), rows, cols, group)
    if kind == "G4":
        halves = codes.reshape(rows, -1, 2, 16)
        codes = np.ascontiguousarray(halves[:, :, 0] | halves[:, :, 1] << 4)
    with kernels.Pool(2) as pool:
        pool.pack_groups(weights.matrix, address(codes), address(scales), address(zeros))
    out, ids = np.empty((rows, cols), np.float32), np.arange(rows, dtype=np.int32)
    kernels.rows(weights.matrix, address(ids), rows, address(out))
    np.testing.assert_allclose(out, w, rtol=1e-5, atol=1e-6)
    x = rng.standard_normal((9, cols), dtype=np.float32)
    # Codes and zeros are summed apart, so rounding is relative to their size, not to the weights'.
    slack = 1e-5 * np.abs(x).sum(axis=1, keepdims=True) * top * scales.max()
    assert np.all(np.abs(product(weights, x) - x.astype(np.float64) @ w.T) <= activation_bound(x, w) * 1.001 + slack)


@pytest.mark.parametrize(
    ("rows", "cols", "group"), [(16, 128, 32), (35, 320, 128), (6, 96, 96), (1, 48, 16), (9, 72, 32), (5, 68, 32), (6, 7, 7)]
)
def test_8_bit_floats(isa: str, rows: int, cols: int, group: int) -> None:
    """Every finite e4m3 number, its own scale for each group of a row; activations stay f32."""
    rng = np.random.default_rng(rows)
    codes = (
        rng.permutation(np.resize(np.setdiff1d(np.arange(256), [127, 255]), rows * cols)).astype(np.uint8).reshape(rows, cols)
    )
    sign, exponent, fraction = codes >> 7, codes >> 3 & 15, codes & 7
    normal = np.ldexp(1 + fraction / 8, exponent.astype(np.int32) - 7)
    values = np.where(exponent > 0, normal, np.ldexp(fraction / 8, -6)) * np.where(sign, -1, 1)
    scales = rng.uniform(0.001, 1.0, (rows, -(-cols // group))).astype(np.float32)
    w = values * np.repeat(scales, group, axis=1)[:, :cols]
    memory = np.concatenate([codes.reshape(-1), scales.view(np.uint8).reshape(-1)])
    weights = Weights("F8", memory, rows, cols, group)
    out, ids = np.empty((rows, cols), np.float32), np.arange(rows, dtype=np.int32)
    kernels.rows(weights.matrix, address(ids), rows, address(out))
    np.testing.assert_allclose(out, w, rtol=1e-6)
    x = rng.standard_normal((7, cols), dtype=np.float32)
    slack = 1e-6 * np.abs(x.astype(np.float64)) @ np.abs(w).T
    assert np.all(np.abs(product(weights, x) - x.astype(np.float64) @ w.T) <= slack)
