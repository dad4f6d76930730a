"""zstd (RFC 8878) for pieces on their way, where it pays: where both ends have it (`cake-core[zstd]`), on links that are slow,
and on files that shrink. bf16 weights do, by a fifth; f16 and quantised ones hardly."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from cake_core.errors import CheckpointError
from cake_core.weights.manifest import PIECE

WORTH = 0.9
"""Size after packing over size before, above which a file is sent as it is."""
LEVEL = 1


@functools.cache
def zstd() -> Any | None:
    """The library, None where it is not installed."""
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        return None


class Packer:
    """Packs pieces for others. A file of which one piece did not shrink is not tried again."""

    def __init__(self) -> None:
        self._tight: set[str] = set()

    def pack(self, file: str, data: bytes) -> bytes | None:
        """The piece packed, None where that does not pay."""
        library = zstd()
        if library is None or file in self._tight:
            return None
        packed: bytes = library.ZstdCompressor(level=LEVEL).compress(data)
        if len(packed) > WORTH * len(data):
            self._tight.add(file)
            return None
        return packed


def unpack(data: memoryview) -> memoryview:
    """A piece that came packed. Raises CheckpointError for what is no piece; never takes more memory than one has."""
    library = zstd()
    if library is None:
        raise CheckpointError("a packed piece came that nobody asked for")
    try:
        if not 0 <= library.get_frame_parameters(data).content_size <= PIECE:
            raise CheckpointError("a packed piece is too long")
        return memoryview(library.ZstdDecompressor().decompress(data, max_output_size=PIECE))
    except library.ZstdError as error:
        raise CheckpointError(f"a packed piece arrived damaged ({error})") from error
