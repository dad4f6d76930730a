"""The cache of weights on a worker: files by what is in them. `views` lays them out as models.

::

    weights/files/NAME            a whole file; NAME is its content name (64 hex digits)
    weights/files/NAME.part       one that is being filled
    weights/files/NAME.pieces     its journal: the hash of each piece that is there

Nothing is ever written elsewhere: file names here are content names. Several processes may share a cache.
"""

from __future__ import annotations

import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cake_core.errors import CapacityError, CheckpointError
from cake_core.weights.journal import Journal
from cake_core.weights.manifest import PIECE, FileSpec, is_name, piece_digest

PART, PIECES = ".part", ".pieces"


def _sleep() -> None:
    time.sleep(0.1)


class Incoming:
    """A file that is being filled, held by this process alone. `missing` are the pieces to get. Used from several threads."""

    def __init__(self, file: FileSpec, path: Path, journal: Journal, missing: Sequence[int]) -> None:
        self.file = file
        self.missing = tuple(missing)
        self._left = set(missing)
        self._journal = journal
        self._lock = threading.Lock()
        self._path = path
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        self._stream = os.fdopen(os.open(path.with_name(path.name + PART), flags, 0o600), "r+b", buffering=0)
        self._stream.truncate(file.nbytes)

    def put(self, piece: int, digest: bytes, data: memoryview) -> bool:
        """Writes a piece and remembers its hash. Whether it was the last one: then `finish` gives the file its name.

        Raises CheckpointError for bytes that are not what the hash or the size says; nothing is written then.
        """
        if len(data) != self.file.piece_length(piece) or piece_digest(data) != digest:
            raise CheckpointError(f"piece {piece} of {self.file.path} arrived damaged")
        with self._lock:
            if piece not in self._left:
                return False
            self._stream.seek(piece * PIECE)
            self._stream.write(data)
            self._journal.put(piece, digest)
            self._left.discard(piece)
            return not self._left

    def lacks(self, start: int, stop: int) -> bool:
        """Whether a byte of start .. stop - 1 is not here yet. Without the lock: a set loses an entry in one step, and writing
        to the disk would hold up who asks."""
        return any(piece in self._left for piece in range(start // PIECE, -(-stop // PIECE)))

    def finish(self) -> None:
        """Has the file on the disk, under its name, once all of it is here."""
        with self._lock:
            os.fsync(self._stream.fileno())
            self._stream.close()
            part = self._path.with_name(self._path.name + PART)
            part.replace(self._path)
            self._journal.stamp(self._path.stat())

    def close(self) -> None:
        """Lets other processes have it, whole or not."""
        with self._lock:
            self._stream.close()
            self._journal.close()


class Store:
    """The cache under `folder`, made when it is first written to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = folder / "files"

    def path(self, name: str) -> Path:
        if not is_name(name):
            raise CheckpointError(f"{name!a:.100} names no content")
        return self.files / name

    def find(self, name: str) -> Path:
        """The file, or what there is of it. Both are one file to a hard link, which stays right when it is whole."""
        path = self.path(name)
        return path if _exists(path) else path.with_name(name + PART)

    def has(self, file: FileSpec) -> bool:
        """Whether the file is here and whole: one whose time of change is not that of its last check is read again, and loses
        the pieces that are damaged."""
        if not is_regular(self.path(file.name)):
            return False
        incoming = self.incoming(file)
        if incoming is not None:
            incoming.close()
        return incoming is None

    def incoming(self, file: FileSpec, wait: Callable[[], None] = _sleep) -> Incoming | None:
        """Starts to fill a file, with the pieces that are here already; None when it is whole.

        Raises CapacityError when the disk has no room for it.
        """
        path = self.path(file.name)
        self.files.mkdir(parents=True, exist_ok=True)
        journal = Journal(path.with_name(file.name + PIECES), file.pieces, wait)
        try:
            missing = self._missing(file, path, journal)
            if missing is None:
                journal.close()
                return None
            self._check_room(len(missing) * PIECE)
            return Incoming(file, path, journal, missing)
        except BaseException:
            journal.close()
            raise

    def _missing(self, file: FileSpec, path: Path, journal: Journal) -> list[int] | None:
        part = path.with_name(path.name + PART)
        if is_regular(path) and path.stat().st_size == file.nbytes:
            if journal.is_stamped(path.stat()):
                return None
            path.replace(part)  # changed since it was checked
        elif _exists(path):
            path.unlink()
        if not file.nbytes:
            path.touch()
            return None
        journal.clear_stamp()
        known = journal.digests()
        found = _checked(part, file, known) if is_regular(part) else []
        if _exists(part) and not is_regular(part):
            part.unlink()
        missing = [piece for piece in range(file.pieces) if piece not in found]
        for piece in missing:
            if known[piece] is not None:
                journal.put(piece, None)
        if missing:
            return missing
        part.replace(path)
        journal.stamp(path.stat())
        return None

    def _check_room(self, nbytes: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if nbytes > free:
            raise CapacityError(
                f"the weights take {nbytes / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free in {self.folder}; "
                "free some space (`cake cache prune`), or set CAKE_CACHE_DIR to a larger disk"
            )

    def read(self, name: str, piece: int) -> tuple[bytes, bytes]:
        """A piece of a whole file and its hash, for another node. Raises CheckpointError where there is none."""
        path = self.path(name)
        if not is_regular(path):
            raise CheckpointError(f"{name} is not here (any more)")
        if piece * PIECE >= path.stat().st_size:
            raise CheckpointError(f"{name} has no piece {piece}")
        with path.open("rb") as stream:
            stream.seek(piece * PIECE)
            data = stream.read(PIECE)
        return piece_digest(data), data

    def holds(self, names: Sequence[str]) -> list[str]:
        """Those of the files that are here in whole."""
        return [name for name in names if is_regular(self.path(name))]


def _exists(path: Path) -> bool:
    return os.path.lexists(path)


def is_regular(path: Path) -> bool:
    """A file itself: a link that somebody put there leads elsewhere."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _checked(part: Path, file: FileSpec, known: Sequence[bytes | None]) -> set[int]:
    """The pieces of an unfinished file that are as their hashes say: a power cut may leave the journal ahead of the disk."""
    found = set()
    with part.open("rb") as stream:
        for piece, digest in enumerate(known):
            if digest is not None:
                stream.seek(piece * PIECE)
                if piece_digest(stream.read(file.piece_length(piece))) == digest:
                    found.add(piece)
    return found
