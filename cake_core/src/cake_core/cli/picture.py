"""Pictures in a terminal: half blocks in 24-bit colour everywhere, the terminal's own graphics where it has them."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Literal

from cake_core import png
from cake_core.model import Buffer

Protocol = Literal["blocks", "kitty", "iterm", "none"]

_SAMPLES = 4  # a cell is the mean of at most 4 x 4 pixels: enough for the eye, and fast in plain Python
_KITTY_CHUNK = 4096


def detect(environ: Mapping[str, str], is_terminal: bool) -> Protocol:
    """What the terminal can show. `none` for a pipe, a dumb terminal, or where NO_COLOR is set."""
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if not is_terminal or environ.get("NO_COLOR") or term in ("", "dumb"):
        return "none"
    if environ.get("TMUX") or term.startswith("screen"):
        return "blocks"
    if environ.get("KITTY_WINDOW_ID") or "kitty" in term or program in ("WezTerm", "ghostty"):
        return "kitty"
    if program == "iTerm.app":
        return "iterm"
    return "blocks"


def render(rgb: Buffer, width: int, height: int, columns: int, protocol: Protocol = "blocks") -> str:
    """8-bit RGB rows as text to print, at most `columns` cells wide, each line ended with a newline."""
    if protocol == "none":
        return ""
    if protocol == "kitty":
        return _kitty(png.encode(rgb, width, height), columns)
    if protocol == "iterm":
        data = base64.b64encode(png.encode(rgb, width, height)).decode()
        return f"\x1b]1337;File=inline=1;width={columns};preserveAspectRatio=1:{data}\a\n"
    return _blocks(memoryview(rgb).cast("B"), width, height, columns)


def lines(width: int, height: int, columns: int) -> int:
    """How many lines `render` takes with half blocks: what to move up before a preview is drawn over the last one."""
    cells = max(1, min(columns, width))
    return (max(1, round(height * cells / width)) + 1) // 2


def _kitty(data: bytes, columns: int) -> str:
    text = base64.b64encode(data).decode()
    pieces = [text[i : i + _KITTY_CHUNK] for i in range(0, len(text), _KITTY_CHUNK)]
    result = []
    for index, piece in enumerate(pieces):
        keys = f"f=100,a=T,c={columns}," if index == 0 else ""
        result.append(f"\x1b_G{keys}m={int(index < len(pieces) - 1)};{piece}\x1b\\")
    return "".join(result) + "\n"


def _blocks(rgb: memoryview, width: int, height: int, columns: int) -> str:
    """Two pixels a character: the upper half block in the foreground colour over the background colour."""
    across = max(1, min(columns, width))
    down = 2 * lines(width, height, columns)
    rows = [[_mean(rgb, width, height, x, y, across, down) for x in range(across)] for y in range(down)]
    result = []
    for upper, lower in zip(rows[::2], rows[1::2], strict=True):
        for (r, g, b), (r2, g2, b2) in zip(upper, lower, strict=True):
            result.append(f"\x1b[38;2;{r};{g};{b};48;2;{r2};{g2};{b2}m\u2580")
        result.append("\x1b[0m\n")
    return "".join(result)


def _mean(rgb: memoryview, width: int, height: int, x: int, y: int, across: int, down: int) -> tuple[int, int, int]:
    """Mean colour of cell (x, y) of a grid of `across` x `down` cells laid over the picture."""
    columns = _spread(x * width // across, max(x * width // across + 1, (x + 1) * width // across))
    rows = _spread(y * height // down, max(y * height // down + 1, (y + 1) * height // down))
    points = [3 * (row * width + column) for row in rows for column in columns]
    red, green, blue = (sum(rgb[point + channel] for point in points) // len(points) for channel in range(3))
    return red, green, blue


def _spread(start: int, stop: int) -> list[int]:
    count = min(_SAMPLES, stop - start)
    return [start + (stop - start) * i // count for i in range(count)]
