"""Random weights of every type, what they stand for by the gguf package, and the error that 8-bit activations explain."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType, dequantize
from numpy.typing import NDArray

import cake_kernels as kernels

Array = NDArray[np.float64]


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
