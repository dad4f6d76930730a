"""GGUF blocks to float32, vectorised over blocks.

Layouts as in ggml's `block_q*` structs; every value is computed in the order of operations of the reference, so results
are equal to the bit. In shapes, n is the number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cake_core.errors import UnsupportedModel

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
_Any = NDArray[Any]

_CRUMBS = np.array([0, 2, 4, 6], np.uint8)
_BITS = np.arange(8, dtype=np.uint8)
_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def dequantize(dtype: str, data: Bytes) -> Floats:
    """The values of whole blocks of type `dtype`, flat.

    Raises UnsupportedModel for a type that is not served.
    """
    if dtype in _PLAIN:
        return _PLAIN[dtype](data)
    if dtype not in _BLOCKS:
        raise UnsupportedModel(f"weights of GGUF type {dtype} are not served (served: {', '.join(SERVED)}); use e.g. Q4_K_M")
    width, function = _BLOCKS[dtype]
    return function(data.reshape(-1, width)).reshape(-1)


def _bf16(data: Bytes) -> Floats:
    return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _half(blocks: Bytes, at: int) -> Floats:
    """The f16 at byte `at` of each block: [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes, group: int) -> Bytes:
    """Of each `group` bytes first all low nibbles, then all high ones: [n, bytes] -> [n, groups, 2 * group]."""
    grouped = packed.reshape(len(packed), -1, group)
    return np.concatenate([grouped & 0x0F, grouped >> 4], axis=-1)


def _crumbs(packed: Bytes) -> Bytes:
    """Of each 32 bytes four times 32 values of two bits: [n, bytes] -> [n, bytes / 8, 32]."""
    grouped = packed.reshape(len(packed), -1, 1, 32)
    return ((grouped >> _CRUMBS[:, None]) & np.uint8(3)).reshape(len(packed), -1, 32)


def _bit_planes(packed: Bytes) -> Bytes:
    """Bit k of 32 bytes is the top bit of the k-th 32 values: [n, 32] -> [n, 8, 32]."""
    return (packed[:, None, :] >> _BITS[:, None]) & np.uint8(1)


def _fifth_bits(packed: Bytes) -> Bytes:
    """32 bits, one a value, as the fifth bit of it: [n, 4] -> [n, 32]."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:], 16)[:, 0].astype(np.float32) - 8)


def _q4_1(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:], 16)[:, 0].astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    values = _nibbles(blocks[:, 6:], 16)[:, 0] | _fifth_bits(blocks[:, 2:6])
    return _half(blocks, 0) * (values.astype(np.float32) - 16)


def _q5_1(blocks: Bytes) -> Floats:
    values = _nibbles(blocks[:, 8:], 16)[:, 0] | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * values.astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks, 0)


def _q2_k(blocks: Bytes) -> Floats:
    scales, low, high = blocks[:, :16], _half(blocks, 80), _half(blocks, 82)
    scale, minimum = low * (scales & 0x0F).astype(np.float32), high * (scales >> 4).astype(np.float32)
    values = _crumbs(blocks[:, 16:80]).reshape(-1, 16, 16).astype(np.float32)
    return scale[:, :, None] * values - minimum[:, :, None]


def _q3_k(blocks: Bytes) -> Floats:
    packed = blocks[:, 96:108]
    low = _nibbles(packed[:, :8], 8)[:, 0]
    high = ((packed[:, None, 8:] >> _CRUMBS[:, None]) & 3).reshape(-1, 16)
    scale = _half(blocks, 108) * ((low | high << 4).astype(np.float32) - 32)
    values = _crumbs(blocks[:, 32:96]).astype(np.float32) - (_bit_planes(blocks[:, :32]) ^ 1).astype(np.float32) * 4
    return scale[:, :, None] * values.reshape(-1, 16, 16)


def _scales_and_minima(blocks: Bytes) -> tuple[Floats, Floats]:
    """The eight 6-bit scales and minima of Q4_K and Q5_K, times the block's own: [n, 8] each."""
    packed = blocks[:, 4:16].reshape(-1, 3, 4)
    first, second, rest = packed[:, 0], packed[:, 1], packed[:, 2]
    scales = np.concatenate([first & 63, (rest & 0x0F) | first >> 6 << 4], axis=-1)
    minima = np.concatenate([second & 63, rest >> 4 | second >> 6 << 4], axis=-1)
    return _half(blocks, 0) * scales.astype(np.float32), _half(blocks, 2) * minima.astype(np.float32)


def _q4_k(blocks: Bytes) -> Floats:
    scale, minimum = _scales_and_minima(blocks)
    values = _nibbles(blocks[:, 16:], 32).reshape(-1, 8, 32).astype(np.float32)
    return scale[:, :, None] * values - minimum[:, :, None]


def _q5_k(blocks: Bytes) -> Floats:
    scale, minimum = _scales_and_minima(blocks)
    values = _nibbles(blocks[:, 48:], 32).reshape(-1, 8, 32) | _bit_planes(blocks[:, 16:48]) << 4
    return scale[:, :, None] * values.astype(np.float32) - minimum[:, :, None]


def _q6_k(blocks: Bytes) -> Floats:
    low = _nibbles(blocks[:, :128], 64).reshape(-1, 8, 32)
    values = (low | _crumbs(blocks[:, 128:192]) << 4).astype(np.float32) - 32
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return scale[:, :, None] * values.reshape(-1, 16, 16)


def _iq4_nl(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _IQ4_VALUES[_nibbles(blocks[:, 2:], 16)[:, 0]]


def _iq4_xs(blocks: Bytes) -> Floats:
    low = (blocks[:, 4:8, None] >> np.array([0, 4], np.uint8) & 0x0F).reshape(-1, 8)
    high = (blocks[:, 2:4, None] >> _CRUMBS & 3).reshape(-1, 8)
    scale = _half(blocks, 0) * ((low | high << 4).astype(np.float32) - 32)
    return scale[:, :, None] * _IQ4_VALUES[_nibbles(blocks[:, 8:], 16)]


_PLAIN: dict[str, Callable[[Bytes], Floats]] = {
    "F32": lambda data: data.view(np.float32),
    "F16": lambda data: data.view(np.float16).astype(np.float32),
    "BF16": _bf16,
}
_BLOCKS: dict[str, tuple[int, Callable[[Bytes], Floats]]] = {
    "Q4_0": (18, _q4_0), "Q4_1": (20, _q4_1), "Q5_0": (22, _q5_0), "Q5_1": (24, _q5_1), "Q8_0": (34, _q8_0),
    "Q2_K": (84, _q2_k), "Q3_K": (110, _q3_k), "Q4_K": (144, _q4_k), "Q5_K": (176, _q5_k), "Q6_K": (210, _q6_k),
    "IQ4_NL": (18, _iq4_nl), "IQ4_XS": (136, _iq4_xs),
}  # fmt: skip
SERVED = (*_PLAIN, *_BLOCKS)
"""Tensor types that `dequantize` reads."""
