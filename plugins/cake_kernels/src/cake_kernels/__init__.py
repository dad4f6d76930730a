"""Products of quantised weights on the CPU, and decode steps of Llama-like models, in C.

Importing raises ImportError where the library is missing or cannot be loaded. Addresses are plain integers (`data_ptr()` of
torch, `ctypes.data` of numpy), so this package needs neither. `CAKE_KERNELS` forces an instruction set: scalar, avx2, avx512,
avx512-bf16 or neon.
"""

from __future__ import annotations

import os
from ctypes import Array, byref
from types import TracebackType

from cake_kernels._native import Layer, Matrix, Shape, Step, load

__all__ = [
    "ALIGNMENT",
    "INT8",
    "PLAIN",
    "TYPES",
    "KernelError",
    "Layer",
    "Matrix",
    "Pool",
    "Shape",
    "Step",
    "isa",
    "packed_bytes",
    "rms_norm",
    "rows",
    "use_isa",
    "use_large_pages",
]

TYPES = {
    "F32": 0, "F16": 1, "BF16": 30, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
    "G4": 100, "G8": 101, "F8": 102,
}  # fmt: skip
"""Number of each weight type: GGUF's names and numbers, group-wise 4 and 8 bit, and 8-bit floats (e4m3)."""

PLAIN = ("F32", "F16", "BF16")
"""Types that are multiplied as they lie in the file, row after row."""

INT8 = 24
"""Number of the 8-bit KV cache type."""

ALIGNMENT = 64
"""Alignment in bytes of packed weights."""

_library = load()


class KernelError(RuntimeError):
    """A call that cannot be carried out: a shape that a type does not have, or no memory."""


def isa() -> str:
    """The instruction set in use."""
    return str(_library.cake_isa().decode())


def use_isa(name: str) -> None:
    """Uses another instruction set from now on, "" for the best. Raises KernelError when this processor lacks it."""
    if _library.cake_use_isa(name.encode()):
        raise KernelError(f"this processor has no {name!r}; leave CAKE_KERNELS empty for the best it has")


if os.environ.get("CAKE_KERNELS"):
    use_isa(os.environ["CAKE_KERNELS"])


def packed_bytes(kind: str, rows: int, cols: int, group: int = 0) -> int:
    """Bytes of a packed matrix. Raises KernelError for a shape that the type does not have."""
    nbytes = int(_library.cake_packed_bytes(TYPES[kind], rows, cols, group))
    if nbytes < 0:
        raise KernelError(f"{rows} x {cols} weights cannot be packed as {kind} in groups of {group}")
    return nbytes


def use_large_pages(memory: int, nbytes: int) -> None:
    """Asks the system for large pages for memory that has not been written; a hint, nothing where it cannot."""
    _library.cake_use_large_pages(memory, nbytes)


def rows(matrix: Matrix, ids: int, count: int, out: int) -> None:
    """out[i] = row ids[i], f32 [count, cols]; `ids` is the address of i32. Raises KernelError for an id out of range."""
    if _library.cake_rows(byref(matrix), ids, count, out):
        raise KernelError(f"a row is not within 0 to {matrix.rows - 1}")


def rms_norm(x: int, weight: int, eps: float, shape: tuple[int, int], y: int) -> None:
    """y = x / rms(x) * weight for f32 x[rows, width] = `shape`."""
    _library.cake_rms_norm(x, weight, eps, *shape, y)


class Pool:
    """Threads that work on one call at a time and sleep between calls; the caller is one of them."""

    def __init__(self, threads: int) -> None:
        self._pool: int | None = None
        self._pool = _library.cake_pool_new(threads)
        if self._pool is None:
            raise KernelError("no memory for a pool of threads")
        self.threads = threads

    def pack(self, matrix: Matrix, blocks: int, order: int | None = None) -> None:
        """Packs GGUF `blocks` into `matrix.data`; packed row i is source row order[i] (address of i32)."""
        if _library.cake_pack(self._pool, matrix.type, matrix.rows, matrix.cols, blocks, order, matrix.data):
            raise KernelError("these blocks cannot be packed")

    def pack_groups(self, matrix: Matrix, codes: int, scales: int, zeros: int) -> None:
        """Packs codes with scales f16 and zeros u8 [rows, groups] into `matrix.data`.

        8-bit codes are u8 [rows, cols]; 4-bit ones [rows, cols / 2], byte j of each 32 columns holding j (low) and 16 + j."""
        if _library.cake_pack_groups(self._pool, byref(matrix), codes, scales, zeros, matrix.data):
            raise KernelError("these groups cannot be packed")

    def matmul(self, matrix: Matrix, bias: int | None, x: int, y: int, m: int, y_stride: int = 0) -> None:
        """y[m, rows] = x[m, cols] * W^T + bias, all f32; rows of y lie `y_stride` values apart, 0: next to one another."""
        if _library.cake_matmul(self._pool, byref(matrix), bias, x, matrix.cols, y, y_stride or matrix.rows, m):
            raise KernelError("no memory for the activations of a product")

    def decode(self, shape: Shape, layers: Array[Layer], step: Step, x: int) -> None:
        """x[step.rows, hidden], f32, through all `layers` in place; their KV caches are written."""
        if _library.cake_decode(self._pool, byref(shape), layers, len(layers), byref(step), x):
            raise KernelError("no memory for a decode step")

    def close(self) -> None:
        """Ends the threads. May be called again."""
        if self._pool is not None:
            _library.cake_pool_free(self._pool)
            self._pool = None

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
