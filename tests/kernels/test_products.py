"""Products of packed weights against the gguf package's values in f64."""

from __future__ import annotations

import numpy as np
import pytest
from tests.kernels.weights import Packed, Weights, activation_bound, address, exact, product
from tests.kernels.weights_table import BLOCKS, random_blocks

import cake_kernels as kernels

ROUNDING = 1e-5
"""Of f32 sums, relative to the sum of magnitudes."""


def _x(m: int, cols: int, rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal((m, cols), dtype=np.float32)
    x[:, : cols // 4] *= 1000  # blocks of very different size
    return x


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(("rows", "cols", "m"), [(16, 256, 1), (37, 512, 3), (64, 1280, 16), (5, 256, 19)])
def test_product_is_within_what_8_bit_activations_explain(isa: str, kind: str, rows: int, cols: int, m: int) -> None:
    rng = np.random.default_rng(rows * cols + m)
    blocks = random_blocks(kind, rows, cols, rng)
    w, x = exact(kind, blocks), _x(m, cols, rng)
    y = product(Packed(kind, blocks, cols), x, threads=2)
    slack = ROUNDING * (np.abs(x).astype(np.float64) @ np.abs(w).T)
    assert np.all(np.abs(y - x.astype(np.float64) @ w.T) <= activation_bound(x, w) * 1.001 + slack)


@pytest.mark.parametrize("kind", BLOCKS)
def test_product_is_exact_for_activations_that_8_bit_hold(isa: str, kind: str) -> None:
    """Whole numbers up to 127 lose nothing: what remains is rounding of f32."""
    rng = np.random.default_rng(7)
    blocks = random_blocks(kind, 48, 768, rng)
    x = rng.integers(-127, 128, (4, 768)).astype(np.float32)
    x.reshape(4, -1, 32)[:, :, 5] = 127
    w = exact(kind, blocks)
    y = product(Packed(kind, blocks, 768), x)
    assert np.all(np.abs(y - x.astype(np.float64) @ w.T) <= ROUNDING * (np.abs(x).astype(np.float64) @ np.abs(w).T))


@pytest.mark.parametrize("kind", [*BLOCKS, "F32", "F16", "BF16"])
def test_a_row_does_not_depend_on_its_batch_or_the_threads(isa: str, kind: str) -> None:
    rng = np.random.default_rng(3)
    packed = _matrix(kind, 96, 512, rng)
    x = _x(21, 512, rng)
    together = product(packed, x, threads=3)
    for m in (1, 2, 5, 8):
        assert np.array_equal(product(packed, np.ascontiguousarray(x[:m])), together[:m])


def _plain(kind: str, w: np.ndarray) -> Weights:
    return Weights(kind, np.ascontiguousarray(w), *w.shape)


def _plain_weights(kind: str, w: np.ndarray) -> np.ndarray:
    if kind == "BF16":
        return (w.view(np.uint32) >> 16).astype(np.uint16)
    return w.astype(np.float16 if kind == "F16" else np.float32)


def _matrix(kind: str, rows: int, cols: int, rng: np.random.Generator) -> Weights:
    if kind in BLOCKS:
        return Packed(kind, random_blocks(kind, rows, cols, rng), cols)
    return _plain(kind, _plain_weights(kind, rng.standard_normal((rows, cols), dtype=np.float32)))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("rows", "cols", "m"), [(16, 256, 1), (37, 100, 5), (1, 7, 2), (130, 48, 33)])
def test_plain_weights(isa: str, kind: str, rows: int, cols: int, m: int) -> None:
    """bf16 weights meet activations rounded to bf16: 2^-9 of each; the others f32 ones."""
    rng = np.random.default_rng(rows + cols)
    plain = _plain(kind, _plain_weights(kind, rng.standard_normal((rows, cols), dtype=np.float32)))
    stored = (plain.memory.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else plain.memory
    w, x = stored.astype(np.float64), rng.standard_normal((m, cols), dtype=np.float32)
    bias = rng.standard_normal(rows, dtype=np.float32)
    error = np.abs(product(plain, x, 2, bias) - (x.astype(np.float64) @ w.T + bias))
    assert np.all(error <= (2**-8 if kind == "BF16" else 2e-6) * (np.abs(x).astype(np.float64) @ np.abs(w).T) + 1e-5)


@pytest.mark.parametrize("kind", BLOCKS)
def test_rows_are_the_gguf_package_s_values(isa: str, kind: str) -> None:
    rng = np.random.default_rng(11)
    blocks = random_blocks(kind, 40, 512, rng)
    order = rng.permutation(40).astype(np.int32)
    packed = Packed(kind, blocks, 512, order)
    ids = np.array([0, 39, 17, 17], np.int32)
    out = np.empty((4, 512), np.float32)
    kernels.rows(packed.matrix, address(ids), 4, address(out))
    np.testing.assert_allclose(out, exact(kind, blocks)[order[ids]], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", BLOCKS)
def test_packing_costs_no_more_than_3_percent(kind: str) -> None:
    values, nbytes = BLOCKS[kind]
    assert kernels.packed_bytes(kind, 4096, 4096) <= 1.03 * 4096 * 4096 // values * nbytes


def test_zero_and_tiny_activations(isa: str) -> None:
    rng = np.random.default_rng(5)
    packed = Packed("Q4_K", random_blocks("Q4_K", 16, 256, rng), 256)
    for value in (0.0, 1e-45, 1e-39):
        assert np.all(np.abs(product(packed, np.full((1, 256), value, np.float32))) <= 1e-35)


def test_what_is_not_a_number_stays_visible(isa: str) -> None:
    rng = np.random.default_rng(5)
    packed = Packed("Q4_0", random_blocks("Q4_0", 16, 256, rng), 256)
    for value in (np.nan, np.inf):
        x = np.ones((1, 256), np.float32)
        x[0, 3] = value
        assert not np.any(np.isfinite(product(packed, x)))


def test_shapes_that_cannot_be_packed_are_refused() -> None:
    for kind, rows, cols, group in (
        ("Q4_K", 16, 128, 0),
        ("Q8_0", 0, 32, 0),
        ("G4", 16, 64, 48),
        ("G4", 16, 64, 0),
        ("F32", 1, 32, 0),
    ):
        with pytest.raises(kernels.KernelError, match="cannot be packed"):
            kernels.packed_bytes(kind, rows, cols, group)


def test_a_row_out_of_range_is_refused() -> None:
    packed = Packed("Q8_0", random_blocks("Q8_0", 16, 32, np.random.default_rng(1)), 32)
    out = np.empty((1, 32), np.float32)
    for bad in (-1, 16):
        with pytest.raises(kernels.KernelError, match="not within 0 to 15"):
            kernels.rows(packed.matrix, address(np.array([bad], np.int32)), 1, address(out))


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(kernels.KernelError, match="has no 'mmx'"):
        kernels.use_isa("mmx")
