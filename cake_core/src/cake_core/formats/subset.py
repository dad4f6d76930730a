"""Files that hold some tensors of a checkpoint, byte for byte as the checkpoint has them: images of files that need not exist.

An image knows its size and can read any stretch of itself from the checkpoint's files. split-model writes images to disk; a
master hands out their pieces to workers. Memory stays flat either way.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cake_core.checkpoint import TensorInfo, sample_bytes
from cake_core.errors import CheckpointError
from cake_core.formats.gguf import GgufCheckpoint

Copied = Callable[[int], None]
"""Told how many more bytes of tensors have been written."""

ALIGNMENT = 64
"""Bytes: the widest vector registers and the cache lines of today's processors."""

_PIECE = 1 << 20
_ALIGNMENT_KEY = "general.alignment"

Stretch = bytes | TensorInfo
"""Part of an image: bytes of its own, or those of a tensor where the checkpoint has them."""


def _length(stretch: Stretch) -> int:
    return len(stretch) if isinstance(stretch, bytes) else stretch.nbytes


@dataclass(frozen=True)
class Image:
    """A file as stretches one after another."""

    stretches: tuple[Stretch, ...]

    def __post_init__(self) -> None:
        starts = tuple(itertools.accumulate((_length(stretch) for stretch in self.stretches), initial=0))
        object.__setattr__(self, "_starts", starts)

    @property
    def _offsets(self) -> tuple[int, ...]:
        starts: tuple[int, ...] = self.__dict__["_starts"]
        return starts

    @property
    def nbytes(self) -> int:
        return self._offsets[-1]

    @property
    def front(self) -> int:
        """Bytes of its own before the first tensor: the header, or all of a file without tensors."""
        own = itertools.takewhile(lambda stretch: isinstance(stretch, bytes), self.stretches)
        return sum(map(_length, own))

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`, fewer at the end. Raises CheckpointError when a file of the checkpoint ends early."""
        found = []
        stop = min(offset + length, self.nbytes)
        index = bisect.bisect_right(self._offsets, offset) - 1
        while offset < stop:
            stretch, start = self.stretches[index], self._offsets[index]
            inside = offset - start
            count = min(stop, start + _length(stretch)) - offset
            if count:
                found.append(stretch[inside : inside + count] if isinstance(stretch, bytes) else _read(stretch, inside, count))
            offset += count
            index += 1
        return b"".join(found)

    def name(self) -> str:
        """Names the content, 64 hex digits: all of its own bytes and a sample of each tensor's, as `Checkpoint.fingerprint`
        takes them, so that two fine-tunes of one base have different files."""
        digest = hashlib.blake2b(digest_size=32)
        for stretch in self.stretches:
            kind, sample = (b"b", stretch) if isinstance(stretch, bytes) else (b"t", sample_bytes(stretch))
            digest.update(kind + struct.pack("<QQ", _length(stretch), len(sample)) + sample)
        return digest.hexdigest()

    def write(self, target: Path, copied: Copied) -> None:
        """Writes the file; `copied` is told of the tensors' bytes. Raises CheckpointError when a source ends early; OSError of
        the target goes through."""
        with target.open("wb") as stream:
            for stretch in self.stretches:
                if isinstance(stretch, bytes):
                    stream.write(stretch)
                    continue
                for offset in range(0, stretch.nbytes, _PIECE):
                    piece = _read(stretch, offset, min(_PIECE, stretch.nbytes - offset))
                    stream.write(piece)
                    copied(len(piece))


def _read(tensor: TensorInfo, offset: int, length: int) -> bytes:
    try:
        with tensor.file.open("rb") as source:
            source.seek(tensor.offset + offset)
            piece = source.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {tensor.file}: {error.strerror}; check that the file is still there") from error
    if len(piece) < length:
        raise CheckpointError(f"{tensor.file} ended while tensor {tensor.name} was copied; download it again")
    return piece


def safetensors_image(tensors: Mapping[str, TensorInfo]) -> Image:
    """A safetensors file of these tensors, under the names of the mapping, in its order."""
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
    return Image((struct.pack("<Q", len(text)) + text, *tensors.values()))


def gguf_image(source: GgufCheckpoint, names: Sequence[str], metadata: bool = True) -> Image:
    """A GGUF file of these tensors with all metadata of the source, whose parts become one; without `metadata` a further part
    of a model whose first part has it."""
    first = source.files[0]
    types = {name: number for file in source.files for name, number in file.types.items()}
    kept = {
        key: span for key, span in first.spans.items() if (metadata or key == _ALIGNMENT_KEY) and not key.startswith("split.")
    }
    header = [struct.pack("<4sIQQ", b"GGUF", first.version, len(names), len(kept))]
    with first.path.open("rb") as file:
        for start, stop in kept.values():
            file.seek(start)
            header.append(file.read(stop - start))
    at = 0
    for name in names:
        tensor = source.tensors[name]
        header.append(_text(name) + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape)))
        header.append(struct.pack("<IQ", types[name], at))
        at += -(-tensor.nbytes // first.alignment) * first.alignment
    front = b"".join(header)
    stretches: list[Stretch] = [front, bytes(-len(front) % first.alignment)]
    for name in names:
        tensor = source.tensors[name]
        stretches += [tensor, bytes(-tensor.nbytes % first.alignment)]
    return Image(tuple(stretch for stretch in stretches if _length(stretch)))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
