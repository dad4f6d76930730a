"""Headers of safetensors files (https://github.com/huggingface/safetensors#format), read without loading a tensor."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cake_core.checkpoint import TensorInfo
from cake_core.errors import CheckpointError

MAX_HEADER_BYTES = 100 * 1024 * 1024

DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip


def read_headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """Tensors of all files. Raises CheckpointError on a damaged file or a tensor that is in two of them."""
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {name} is in {tensors[name].file.name} and in {file.name}; remove one of the files"
                )
            tensors[name] = tensor
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Tensors of one file, with absolute offsets, checked against its size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{file} is truncated or not a safetensors file; download it again")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has a damaged header; download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a damaged header; download it again")
    header.pop("__metadata__", None)
    return {name: _tensor(file, 8 + length, size, name, entry) for name, entry in header.items()}


def _tensor(file: Path, base: int, size: int, name: str, entry: Any) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        bits = DTYPE_BITS[dtype]
        valid = all(type(n) is int and n >= 0 for n in (*shape, start, stop)) and stop - start == math.prod(shape) * bits // 8
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: tensor {name!r} has a damaged or unknown description; download the file again"
        ) from error
    if not valid:
        raise CheckpointError(f"{file}: tensor {name!r} has a shape and a length that disagree; download the file again")
    if base + stop > size:
        raise CheckpointError(f"{file} is truncated: it ends before tensor {name!r}; download it again")
    return TensorInfo(name, dtype, shape, file, base + start, stop - start)
