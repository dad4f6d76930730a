"""Headers of GGUF files, versions 2 and 3, little-endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

Reads metadata and tensor descriptions without loading a tensor. Every length is checked against the file before anything
is taken from it, so a damaged file is a CheckpointError and never a large allocation.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from cake_core.checkpoint import TensorInfo
from cake_core.errors import CheckpointError, UnsupportedModel

MAGIC = b"GGUF"
VERSIONS = (2, 3)
HEADER_BYTES = 24
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
"""Tensor types of the format: number -> name, values a block, bytes a block. Reading one is the model plugin's business."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What one file says of itself. `spans` are the bytes (start, stop) of each metadata entry, key included."""

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, Any]
    spans: Mapping[str, tuple[int, int]]
    types: Mapping[str, int]
    tensors: Mapping[str, TensorInfo]


class GgufArray(Sequence[Any]):
    """An array of the metadata, read from its file when first looked at (a vocabulary has 100,000 entries and more)."""

    def __init__(self, file: Path, kind: int, count: int, start: int, stop: int) -> None:
        self._file, self._kind, self._count, self._start, self._stop = file, kind, count, start, stop

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._values[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def __repr__(self) -> str:
        return f"GgufArray({self._count} values of {self._file.name})"

    @cached_property
    def _values(self) -> list[Any]:
        try:
            with self._file.open("rb") as stream:
                stream.seek(self._start)
                data = stream.read(self._stop - self._start)
        except OSError as error:
            raise CheckpointError(f"cannot read {self._file}: {error.strerror}") from error
        if len(data) != self._stop - self._start:
            raise CheckpointError(f"{self._file} changed while it was open; load the model again")
        if self._kind != _STRING:
            return list(struct.unpack(f"<{self._count}{_SCALARS[self._kind]}", data))
        values, at = [], 0
        try:
            for _ in range(self._count):
                begin = at + 8
                at = begin + _U64.unpack_from(data, at)[0]
                values.append(data[begin:at].decode())
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self._file} has text that is not UTF-8 in its metadata; download it again") from error
        return values


class _Cursor:
    """Takes bytes off a file one after another, never beyond its end."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.size, self.at = file, data, len(data), 0

    def skip(self, length: int) -> int:
        """Moves on by `length`; returns where that began."""
        start = self.at
        if length > self.size - start:
            raise CheckpointError(f"{self.file} is truncated or damaged at byte {start}; download it again")
        self.at = start + length
        return start

    def u32(self) -> int:
        return int(_U32.unpack_from(self.data, self.skip(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack_from(self.data, self.skip(8))[0])

    def count(self, least: int) -> int:
        """A number of things of at least `least` bytes each, which must fit into the rest of the file."""
        count = self.u64()
        if count > (self.size - self.at) // least:
            raise CheckpointError(f"{self.file} is truncated or damaged at byte {self.at}; download it again")
        return count

    def text(self) -> str:
        length = self.u64()
        start = self.skip(length)
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.file} has text that is not UTF-8 at byte {start}; download it again") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        code = _SCALARS.get(kind)
        if code is None:
            raise CheckpointError(f"{self.file} has metadata of unknown type {kind} at byte {self.at}; it may be damaged")
        return struct.unpack_from(f"<{code}", self.data, self.skip(struct.calcsize(code)))[0]

    def _array(self) -> GgufArray:
        kind = self.u32()
        if kind == _STRING:
            count = self.count(8)
            start = self.at
            self._skip_texts(count)
        elif kind in _SCALARS:
            width = struct.calcsize(_SCALARS[kind])
            count = self.count(width)
            start = self.skip(count * width)
        else:
            raise CheckpointError(f"{self.file} has an array of unknown type {kind} at byte {self.at}; it may be damaged")
        return GgufArray(self.file, kind, count, start, self.at)

    def _skip_texts(self, count: int) -> None:
        """`skip(u64())` count times, in one loop of local names: the one hot place of opening a file."""
        data, at, last, unpack = self.data, self.at, self.size - 8, _U64.unpack_from
        for _ in range(count):
            if at > last:
                break
            at += 8 + unpack(data, at)[0]
        if at > self.size:
            raise CheckpointError(f"{self.file} is truncated or damaged at byte {self.at}; download it again")
        self.at = at


def read_gguf(path: Path) -> GgufFile:
    """Reads the header of one file.

    Raises CheckpointError for one that cannot be read, is no GGUF or is damaged, UnsupportedModel for a tensor type that
    the format did not have when this was written.
    """
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            if size < HEADER_BYTES or stream.read(4) != MAGIC:
                raise CheckpointError(f"{path} is not a GGUF file, or its download stopped at once; download it again")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(_Cursor(path, data))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _read(cursor: _Cursor) -> GgufFile:
    cursor.skip(len(MAGIC))
    version = cursor.u32()
    if version not in VERSIONS:
        big = " (big-endian files are not served)" if version >= 1 << 16 else ""
        raise UnsupportedModel(f"{cursor.file} is GGUF version {version}{big}; convert it to version 3, little-endian")
    tensor_count, entries = cursor.count(24), cursor.count(12)
    metadata, spans = _read_metadata(cursor, entries)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise CheckpointError(f"{cursor.file} has the alignment {alignment!r}, not a power of two; download it again")
    described = [_read_tensor(cursor) for _ in range(tensor_count)]
    base = -(-cursor.at // alignment) * alignment
    tensors, types = {}, {}
    for name, number, shape, offset in described:
        if name in tensors:
            raise CheckpointError(f"{cursor.file} has the tensor {name!r} twice; download it again")
        if offset % alignment:
            raise CheckpointError(f"{cursor.file}: tensor {name!r} is not aligned to {alignment}; download the file again")
        tensors[name] = _tensor(cursor, name, number, shape, base + offset)
        types[name] = number
    return GgufFile(cursor.file, version, alignment, metadata, spans, types, tensors)


def _read_metadata(cursor: _Cursor, entries: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(entries):
        start = cursor.at
        key = cursor.text()
        if key in metadata:
            raise CheckpointError(f"{cursor.file} has the metadata {key!r} twice; download it again")
        metadata[key] = cursor.value(cursor.u32())
        spans[key] = (start, cursor.at)
    return metadata, spans


def _read_tensor(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    """Name, type number, shape (outermost first) and offset in the data of the next tensor."""
    name, dimensions = cursor.text(), cursor.u32()
    if dimensions > MAX_DIMENSIONS:
        raise CheckpointError(f"{cursor.file}: tensor {name!r} has {dimensions} dimensions; download the file again")
    shape = tuple(cursor.u64() for _ in range(dimensions))[::-1]
    return name, cursor.u32(), shape, cursor.u64()


def _tensor(cursor: _Cursor, name: str, number: int, shape: tuple[int, ...], start: int) -> TensorInfo:
    if number not in TYPES:
        raise UnsupportedModel(
            f"{cursor.file}: tensor {name!r} has GGUF type {number}, which this version of Cake does not know; "
            "use a file of another quantisation, e.g. Q4_K_M or Q8_0"
        )
    dtype, block, width = TYPES[number]
    if (shape[-1] if shape else 1) % block:
        raise CheckpointError(f"{cursor.file}: rows of tensor {name!r} are not whole {dtype} blocks; download the file again")
    nbytes = math.prod(shape) // block * width
    if start + nbytes > cursor.size:
        raise CheckpointError(f"{cursor.file} is truncated: it ends before tensor {name!r}; download it again")
    return TensorInfo(name, dtype, shape, cursor.file, start, nbytes)
