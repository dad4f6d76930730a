"""Which files make a part of a model: path, content name, size. What a master tells a worker before a byte of weights moves.

Files are cut into pieces of PIECE bytes. A piece is what is asked for, checked by its BLAKE2b hash, written and remembered: a
quarter of 4 MiB, so that four of them may be on their way and a transfer that is killed repeats at most 4 MiB.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cake_core.errors import ProtocolError
from cake_core.filenames import is_safe_path

PIECE = 1 << 20
DIGEST = 32
"""Bytes of the hash of a piece."""

MAX_FILES = 4096
MAX_FILE_BYTES = 1 << 50

_NAME = re.compile(r"[0-9a-f]{64}")


def piece_digest(data: bytes | bytearray | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


def is_name(text: object) -> bool:
    """Whether this can be the content name of a file (`Image.name`)."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class FileSpec:
    """A file of a manifest: where it goes in the folder of the model, its content name, its size in bytes, and how many of
    them, from the first on, must be there before it can be opened: the header of weights, the whole of anything else."""

    path: str
    name: str
    nbytes: int
    front: int

    def __post_init__(self) -> None:
        if not is_safe_path(self.path):
            raise ProtocolError(f"{self.path!a:.100} is no path inside a model's folder; the sender is broken or hostile")
        if not is_name(self.name):
            raise ProtocolError(f"{self.path}: {self.name!a:.100} names no content")
        if type(self.nbytes) is not int or not 0 <= self.nbytes <= MAX_FILE_BYTES:
            raise ProtocolError(f"{self.path}: {self.nbytes!a:.100} is no size")
        if type(self.front) is not int or not 0 <= self.front <= self.nbytes:
            raise ProtocolError(f"{self.path}: {self.front!a:.100} is no size of a header")

    @property
    def pieces(self) -> int:
        return -(-self.nbytes // PIECE)

    @property
    def front_pieces(self) -> int:
        return -(-self.front // PIECE)

    def piece_length(self, index: int) -> int:
        return min(PIECE, self.nbytes - index * PIECE)

    def as_fields(self) -> list[Any]:
        return [self.path, self.name, self.nbytes, self.front]


def parse_files(entries: Iterable[Any]) -> tuple[FileSpec, ...]:
    """A manifest from a peer. Raises ProtocolError for anything that is not one, or that names a path twice."""
    listed = list(entries)
    if len(listed) > MAX_FILES:
        raise ProtocolError(f"a manifest of {len(listed)} files, over the limit of {MAX_FILES}")
    files = []
    for entry in listed:
        if not isinstance(entry, list) or len(entry) != 4:
            raise ProtocolError("a damaged manifest")
        files.append(FileSpec(*entry))
    # Not every file system tells `A` from `a`.
    if len({file.path.lower() for file in files}) < len(files):
        raise ProtocolError("a manifest that names a file twice")
    return tuple(files)


def view_name(files: Iterable[FileSpec]) -> str:
    """Names the folder that these files make."""
    text = "\n".join(f"{file.name} {file.path}" for file in sorted(files, key=lambda file: file.path))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def by_name(files: Iterable[FileSpec]) -> Mapping[str, FileSpec]:
    """One entry a content: a file that is in a model twice travels once."""
    return {file.name: file for file in files}
