"""PNG writing with the standard library only: enough to hand a picture to a file, a browser or a terminal."""

from __future__ import annotations

import struct
import zlib

from cake_core.errors import ConfigError
from cake_core.model import Buffer

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def encode(rgb: Buffer, width: int, height: int, text: dict[str, str] | None = None) -> bytes:
    """8-bit RGB rows, top to bottom, as a PNG file. `text` becomes tEXt chunks (Latin-1), e.g. {"Software": "Cake"}.

    Raises ConfigError when `rgb` does not have `width * height * 3` bytes.
    """
    view = memoryview(rgb).cast("B")
    stride = width * 3
    if width < 1 or height < 1 or view.nbytes != stride * height:
        raise ConfigError(f"a {width} x {height} RGB picture has {stride * height} bytes, not {view.nbytes}")
    # Each row starts with filter type 0: a better filter would cost a Python loop over every byte.
    rows = b"".join(b"\0" + view[y * stride : (y + 1) * stride] for y in range(height))
    chunks = [_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    for key, value in (text or {}).items():
        chunks.append(_chunk(b"tEXt", f"{key}\0{value}".encode("latin-1", "replace")))
    chunks += [_chunk(b"IDAT", zlib.compress(rows, 6)), _chunk(b"IEND", b"")]
    return SIGNATURE + b"".join(chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def size(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG file. Raises ConfigError for bytes that are none."""
    if len(png) < 24 or not png.startswith(SIGNATURE) or png[12:16] != b"IHDR":
        raise ConfigError("not a PNG file")
    width, height = struct.unpack(">II", png[16:24])
    return width, height
