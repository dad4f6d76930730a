"""PNG files with the standard library only: enough to hand a picture to a file, a browser or a terminal."""

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


def decode(png: bytes) -> tuple[int, int, bytes]:
    """Width, height and 8-bit RGB rows of a PNG file as image models and libraries write them.

    Raises ConfigError for what is no PNG, damaged, or not 8-bit RGB without interlacing.
    """
    width, height = size(png)
    if tuple(png[24:29]) != (8, 2, 0, 0, 0):
        raise ConfigError("only 8-bit RGB PNG files without interlacing can be read here")
    data, at = b"", len(SIGNATURE)
    while at + 8 <= len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += length + 12
    stride = 3 * width
    try:
        rows = zlib.decompressobj().decompress(data, (stride + 1) * height)
    except zlib.error as error:
        raise ConfigError(f"damaged PNG file: {error}") from error
    if len(rows) != (stride + 1) * height:
        raise ConfigError("the PNG file ends too early")
    result, above = bytearray(), bytes(stride)
    for y in range(height):
        start = y * (stride + 1)
        above = _unfilter(rows[start], rows[start + 1 : start + 1 + stride], above)
        result += above
    return width, height, bytes(result)


def _unfilter(kind: int, row: bytes, above: bytes) -> bytes:
    """One row as it was before its PNG filter; three bytes a pixel."""
    if kind == 0:
        return row
    if kind > 4:
        raise ConfigError("damaged PNG file: unknown row filter")
    out = bytearray(row)
    for i, value in enumerate(row):
        left, up, corner = (out[i - 3], above[i], above[i - 3]) if i >= 3 else (0, above[i], 0)
        predicted = (0, left, up, (left + up) // 2, _paeth(left, up, corner))[kind]
        out[i] = (value + predicted) & 255
    return bytes(out)


def _paeth(left: int, up: int, corner: int) -> int:
    """Whichever neighbour is nearest to left + up - corner, as the PNG specification orders them."""
    distances = (abs(up - corner), abs(left - corner), abs(left + up - 2 * corner))
    return (left, up, corner)[distances.index(min(distances))]
