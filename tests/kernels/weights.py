"""Random weights of every type, what they stand for by the gguf package, and the error that 8-bit activations explain."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType, dequantize
from numpy.typing import NDArray

import cake_kernels as kernels

Array = NDArray[np.float64]

BLOCKS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
"""Where the f16 of a block are: random bits there would be infinities."""


LEVELS = {"Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31, "Q8_0": 128, "Q4_K": 945, "Q5_K": 1953, "Q6_K": 4096}
"""The largest number that a block's f16 scale is multiplied with."""


def random_blocks(kind: str, rows: int, cols: int, rng: np.random.Generator, size: float = 1.0) -> NDArray[np.uint8]:
    """Every bit pattern of the codes; weights of up to about `size`."""
    values, nbytes = BLOCKS[kind]
    blocks = rng.integers(0, 256, (rows, cols // values, nbytes), dtype=np.uint8)
    for at in HALVES[kind]:
        scale = rng.uniform(-size, size, (rows, cols // values, 1))
        scale = (scale / LEVELS[kind]).astype(np.float16)
        blocks[:, :, at : at + 2] = scale.view(np.uint8)
    return blocks.reshape(rows, -1)


def exact(kind: str, blocks: NDArray[np.uint8]) -> Array:
    """The weights by the gguf package, in f64."""
    return np.asarray(dequantize(blocks, GGMLQuantizationType[kind]), np.float64)


def aligned(nbytes: int) -> NDArray[np.uint8]:
    memory = np.empty(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes]


def address(array: NDArray[np.generic]) -> int:
    return int(array.ctypes.data)


class Weights:
    """A matrix with the memory it lives in."""

    def __init__(self, kind: str, memory: NDArray[np.generic], rows: int, cols: int, group: int = 0) -> None:
        self.memory = memory
        self.matrix = kernels.Matrix(address(memory), kernels.TYPES[kind], rows, cols, group)


class Packed(Weights):
    def __init__(self, kind: str, blocks: NDArray[np.uint8], cols: int, order: NDArray[np.int32] | None = None) -> None:
        super().__init__(kind, aligned(kernels.packed_bytes(kind, len(blocks), cols)), len(blocks), cols)
        with kernels.Pool(2) as pool:
            pool.pack(self.matrix, address(blocks), None if order is None else address(order))


def product(w: Weights, x: NDArray[np.float32], threads: int = 1, bias: NDArray[np.float32] | None = None) -> Array:
    y = np.full((len(x), w.matrix.rows), np.nan, np.float32)
    with kernels.Pool(threads) as pool:
        pool.matmul(w.matrix, None if bias is None else address(bias), address(x), address(y), len(x))
    return y.astype(np.float64)


def activation_bound(x: NDArray[np.float32], w: Array) -> Array:
    """Most that rounding x to 8 bit, 32 values a scale, can change x W^T: half a step a value, times |W|. [m, rows]"""
    m, cols = x.shape
    steps = np.abs(x.reshape(m, -1, 32)).max(axis=-1) / 127
    return np.repeat(steps / 2, 32, axis=-1).reshape(m, cols).astype(np.float64) @ np.abs(w).T
