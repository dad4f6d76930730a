"""Who answers FETCH: a master from its checkpoint, a worker from its cache. Files have content names here, never paths."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from typing import Protocol

from cake_core.errors import CheckpointError
from cake_core.formats.subset import Image
from cake_core.links.link import Link
from cake_core.weights.manifest import PIECE, FileSpec, is_name, piece_digest
from cake_core.weights.packing import Packer, unpack, zstd
from cake_core.weights.store import Store
from cake_core.wire.protocol import Message, Type

FAST = 0.004
"""Seconds for a piece of 1 MiB: 2 Gbit/s."""


class Supply(Protocol):
    """Pieces of files by content name. Raises CheckpointError for one that is not here."""

    packer: Packer

    def piece(self, name: str, piece: int) -> tuple[bytes, bytes]: ...

    def holds(self, names: list[str]) -> list[str]: ...


class ImageSupply:
    """Files that need not exist, read from a checkpoint when they are asked for and hashed on the way. `sent` counts bytes."""

    def __init__(self) -> None:
        self.sent = 0
        self.packer = Packer()
        self._images: dict[str, Image] = {}
        self._lock = threading.Lock()

    def offer(self, files: Mapping[str, Image]) -> tuple[FileSpec, ...]:
        """Takes files (by path) into the offer; their manifest."""
        named = {path: (image.name(), image) for path, image in files.items()}
        with self._lock:
            self._images.update(dict(named.values()))
        return tuple(FileSpec(path, name, image.nbytes, image.front) for path, (name, image) in named.items())

    def holds(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self._images]

    def piece(self, name: str, piece: int) -> tuple[bytes, bytes]:
        image = self._images.get(name)
        if image is None or piece * PIECE >= image.nbytes:
            raise CheckpointError(f"{name:.64} is not offered here")
        data = image.read(piece * PIECE, PIECE)
        with self._lock:
            self.sent += len(data)
        return piece_digest(data), data


class StoreSupply:
    """The whole files of a cache."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.packer = Packer()

    def holds(self, names: list[str]) -> list[str]:
        return self._store.holds(names)

    def piece(self, name: str, piece: int) -> tuple[bytes, bytes]:
        return self._store.read(name, piece)


def serve_weights(supply: Supply, link: Link, message: Message) -> None:
    """Answers a FETCH or HOLDS. Raises CheckpointError for what is not here."""
    fields = message.fields
    if message.type is Type.HOLDS:
        names = [name for name in fields["files"] if is_name(name)]
        link.answer(message, Type.HELD, {"files": supply.holds(names)})
        return
    digest, data = supply.piece(fields["file"], fields["piece"])
    packed = supply.packer.pack(fields["file"], data) if fields.get("zstd") is True else None
    sent = data if packed is None else packed
    answer = {"digest": digest, "zstd": packed is not None, "tensors": [["data", "u8", [len(sent)]]]}
    link.answer(message, Type.PIECE, answer, [sent])


class LinkSource:
    """The other end of a link as a source of pieces. `files` are those it has; None: all."""

    def __init__(self, link: Link, files: Iterable[str] | None = None) -> None:
        self.name = link.name
        self._link = link
        self._files = None if files is None else frozenset(files)
        self._slow = True

    def has(self, file: str) -> bool:
        return self._files is None or file in self._files

    def fetch(self, file: str, piece: int) -> tuple[bytes, memoryview]:
        began = time.monotonic()
        message, body = self._link.ask(
            Type.FETCH, {"file": file, "piece": piece, "zstd": self._slow and zstd() is not None}
        ).result()
        # Where pieces come faster than they are packed, packing would hold them up.
        self._slow = time.monotonic() - began > FAST
        return message.fields["digest"], unpack(body) if message.fields.get("zstd") is True else body
