"""Writes some tensors of a checkpoint to a new file, byte for byte and piece by piece: memory stays flat."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from cake_core.checkpoint import TensorInfo
from cake_core.errors import CheckpointError
from cake_core.formats.gguf import GgufCheckpoint

Copied = Callable[[int], None]
"""Told how many more bytes have been written."""

ALIGNMENT = 64
"""Bytes: the widest vector registers and the cache lines of today's processors."""

_PIECE = 1 << 20


def write_safetensors(target: Path, tensors: Mapping[str, TensorInfo], copied: Copied) -> None:
    """A safetensors file of these tensors, under the names of the mapping, in its order.

    Raises CheckpointError when a source ends early; OSError of the target goes through.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # Padded so that the first tensor, and those that follow it there too, lie in a mapped file as they did in the source:
    # kernels may round differently on memory that is aligned differently.
    start = next((tensor.offset for tensor in tensors.values()), 0)
    text += b" " * ((start - 8 - len(text)) % ALIGNMENT)
    with target.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            _copy(tensor, stream, copied)


def write_gguf(target: Path, source: GgufCheckpoint, names: Sequence[str], copied: Copied) -> None:
    """A GGUF file of these tensors with all metadata of the source, whose parts become one.

    Raises as `write_safetensors`.
    """
    first = source.files[0]
    types = {name: number for file in source.files for name, number in file.types.items()}
    kept = {key: span for key, span in first.spans.items() if not key.startswith("split.")}
    with target.open("wb") as stream:
        stream.write(struct.pack("<4sIQQ", b"GGUF", first.version, len(names), len(kept)))
        with first.path.open("rb") as metadata:
            for start, stop in kept.values():
                metadata.seek(start)
                stream.write(metadata.read(stop - start))
        at = 0
        for name in names:
            tensor = source.tensors[name]
            stream.write(_text(name) + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape)))
            stream.write(struct.pack("<IQ", types[name], at))
            at += -(-tensor.nbytes // first.alignment) * first.alignment
        for name in names:
            stream.write(bytes(-stream.tell() % first.alignment))
            _copy(source.tensors[name], stream, copied)
        stream.write(bytes(-stream.tell() % first.alignment))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _copy(tensor: TensorInfo, target: BinaryIO, copied: Copied) -> None:
    left = tensor.nbytes
    with tensor.file.open("rb") as source:
        source.seek(tensor.offset)
        while left:
            piece = source.read(min(left, _PIECE))
            if not piece:
                raise CheckpointError(f"{tensor.file} ended while tensor {tensor.name} was copied; download it again")
            target.write(piece)
            left -= len(piece)
            copied(len(piece))
