"""Which pieces of a file are there: a fixed row of hashes beside it, zero where a piece is missing, locked while one process
fills the file. A row that is followed by a stamp (time of change and size of the file) has been checked for that very state.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from cake_core.weights.manifest import DIGEST

_MISSING = bytes(DIGEST)
_STAMP = struct.Struct("<QQ")


class Journal:
    """An open and locked row. `wait` is called, again and again, while another process holds it; it sleeps, or raises."""

    def __init__(self, path: Path, pieces: int, wait: Callable[[], None]) -> None:
        self._pieces = pieces
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        self._file: BinaryIO = os.fdopen(os.open(path, flags, 0o600), "r+b", buffering=0)
        try:
            while not _lock(self._file):
                wait()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Unlocks it."""
        if not self._file.closed:
            _unlock(self._file)
            self._file.close()

    def digests(self) -> list[bytes | None]:
        """The hash of each piece that is there, None for the others."""
        self._file.seek(0)
        row = self._file.read(self._pieces * DIGEST).ljust(self._pieces * DIGEST, b"\0")
        found = (row[start : start + DIGEST] for start in range(0, len(row), DIGEST))
        return [None if digest == _MISSING else digest for digest in found]

    def put(self, piece: int, digest: bytes | None) -> None:
        self._file.seek(piece * DIGEST)
        self._file.write(digest or _MISSING)

    def stamp(self, status: os.stat_result) -> None:
        """Remembers that the file has been checked in this state."""
        self._file.seek(self._pieces * DIGEST)
        self._file.write(_STAMP.pack(status.st_mtime_ns, status.st_size))

    def clear_stamp(self) -> None:
        self._file.truncate(self._pieces * DIGEST)

    def is_stamped(self, status: os.stat_result) -> bool:
        self._file.seek(self._pieces * DIGEST)
        return self._file.read(_STAMP.size) == _STAMP.pack(status.st_mtime_ns, status.st_size)


if sys.platform == "win32":
    import msvcrt

    _LOCKED_BYTE = 1 << 40

    def _lock(file: BinaryIO) -> bool:
        file.seek(_LOCKED_BYTE)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(file: BinaryIO) -> None:
        file.seek(_LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _lock(file: BinaryIO) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)
