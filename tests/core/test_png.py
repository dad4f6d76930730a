"""PNG files and terminal pictures, made with the standard library, read back by hand."""

from __future__ import annotations

import re
import struct
import zlib

import pytest

from cake_core import png
from cake_core.cli import picture
from cake_core.errors import ConfigError


def _decode(data: bytes) -> tuple[int, int, bytes]:
    assert data.startswith(png.SIGNATURE)
    position, chunks = 8, {}
    while position < len(data):
        (length,), kind = struct.unpack(">I", data[position : position + 4]), data[position + 4 : position + 8]
        body = data[position + 8 : position + 8 + length]
        (crc,) = struct.unpack(">I", data[position + 8 + length : position + 12 + length])
        assert crc == zlib.crc32(kind + body)
        chunks[kind] = body
        position += 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour) == (8, 2)
    rows = zlib.decompress(chunks[b"IDAT"])
    stride = 1 + 3 * width
    assert all(rows[y * stride] == 0 for y in range(height))
    return width, height, b"".join(rows[y * stride + 1 : (y + 1) * stride] for y in range(height))


def test_a_picture_comes_back_as_it_was() -> None:
    rgb = bytes(range(2 * 3 * 3))
    data = png.encode(rgb, 2, 3, {"Software": "Cake"})
    assert _decode(data) == (2, 3, rgb)
    assert png.size(data) == (2, 3)
    assert b"tEXtSoftware\0Cake" in data


@pytest.mark.parametrize(("width", "height"), [(2, 2), (0, 3), (3, 1)])
def test_wrong_sizes_are_refused(width: int, height: int) -> None:
    with pytest.raises(ConfigError, match="bytes"):
        png.encode(bytes(18), width, height)


def test_size_refuses_other_files() -> None:
    with pytest.raises(ConfigError, match="not a PNG"):
        png.size(b"GIF89a" + bytes(30))


def test_half_blocks_show_the_colours_of_their_cells() -> None:
    top, bottom = bytes((255, 0, 0)) * 8 * 4, bytes((0, 0, 255)) * 8 * 4
    text = picture.render(top + bottom, 8, 8, 2)
    assert re.findall(r"38;2;(\d+;\d+;\d+);48;2;(\d+;\d+;\d+)m", text) == [("255;0;0", "0;0;255")] * 2
    assert text.count("\n") == picture.lines(8, 8, 2) == 1


def test_a_picture_is_never_wider_than_asked_or_than_its_pixels() -> None:
    text = picture.render(bytes(64 * 32 * 3), 64, 32, 40)
    assert all(line.count("\u2580") == 40 for line in text.splitlines())
    assert text.count("\n") == picture.lines(64, 32, 40) == 10
    assert picture.render(bytes(4 * 4 * 3), 4, 4, 40).splitlines()[0].count("\u2580") == 4


def test_graphics_terminals_get_the_png_itself() -> None:
    import base64

    rgb = bytes(range(256)) * 48
    kitty = picture.render(rgb, 64, 64, 20, "kitty")
    parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", kitty)
    assert base64.b64decode("".join(piece for _, piece in parts)) == png.encode(rgb, 64, 64)
    assert parts[0][0].startswith("f=100,a=T,c=20,")
    assert parts[-1][0].endswith("m=0")
    assert picture.render(rgb, 64, 64, 20, "iterm").startswith("\x1b]1337;File=inline=1;width=20")
    assert picture.render(rgb, 64, 64, 20, "none") == ""


@pytest.mark.parametrize(
    ("environ", "terminal", "expected"),
    [
        ({"TERM": "xterm-256color"}, True, "blocks"),
        ({"TERM": "xterm-kitty"}, True, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, True, "iterm"),
        ({"TERM": "xterm-kitty", "TMUX": "1"}, True, "blocks"),
        ({"TERM": "xterm-kitty"}, False, "none"),
        ({"TERM": "dumb"}, True, "none"),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, "none"),
    ],
)
def test_what_a_terminal_can_show(environ: dict[str, str], terminal: bool, expected: str) -> None:
    assert picture.detect(environ, terminal) == expected
