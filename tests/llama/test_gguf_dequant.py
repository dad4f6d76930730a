"""Dequantisation against the gguf package, to the bit, on random blocks of every served type."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from cake_core.errors import UnsupportedModel
from cake_core.formats.gguf_header import TYPES
from cake_llama.dequant import SERVED, dequantize

SIZES = {name: (block, width) for name, block, width in TYPES.values()}


def random_blocks(dtype: str, count: int, seed: int) -> np.ndarray:
    """Random bytes: every bit pattern of scales and values occurs, infinities and NaN of the scales with them."""
    return np.random.default_rng(seed).integers(0, 256, (count, SIZES[dtype][1]), np.uint8)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize("count", [1, 3, 512])
def test_equals_the_gguf_package_to_the_bit(dtype: str, count: int) -> None:
    blocks = random_blocks(dtype, count * (256 if SIZES[dtype][0] == 1 else 1), seed=count)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[dtype]).reshape(-1)
    found = dequantize(dtype, blocks.reshape(-1))
    assert found.dtype == np.float32
    numbers = ~np.isnan(expected)
    assert numbers.mean() > 0.5
    np.testing.assert_array_equal(np.isnan(found), ~numbers)
    np.testing.assert_array_equal(found[numbers].view(np.uint32), expected[numbers].astype(np.float32).view(np.uint32))


def test_a_type_that_is_not_served_is_named() -> None:
    with pytest.raises(UnsupportedModel, match="IQ1_S are not served"):
        dequantize("IQ1_S", np.zeros(50, np.uint8))


def test_type_sizes_equal_the_gguf_package() -> None:
    known = {t.name: gguf.GGML_QUANT_SIZES[t] for t in gguf.GGMLQuantizationType}
    assert {name: SIZES[name] for name in known if name in SIZES} == {name: known[name] for name in known if name in SIZES}
    assert {number: TYPES[number][0] for number in TYPES} == {t.value: t.name for t in gguf.GGMLQuantizationType if t in TYPES}
