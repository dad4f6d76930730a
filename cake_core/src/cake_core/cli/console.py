"""What commands print: notes and tables on stderr or stdout, sizes and durations for people, progress bars for terminals."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from cake_core.errors import ConfigError


def note(text: str = "") -> None:
    """A line on stderr: everything that is not the answer itself."""
    click.echo(text, err=True)


def human_bytes(count: float) -> str:
    """`1.2 GB`: decimal units, as disks and model cards count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def parse_size(text: str) -> int:
    """Bytes of `50GB`, `1.5 TB`, `800MB` or a plain number. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{text!r} is no size; write 50GB, 800MB or a number of bytes")
    return int(float(match[1]) * 1000 ** " kmgt".index(match[2].lower() or " "))


def human_seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), err: bool = False) -> None:
    """Columns as wide as their widest cell; the columns in `right` are aligned to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        click.echo("  ".join(cells).rstrip(), err=err)


def show_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


class Bars:
    """Progress of one long thing with several parts (nodes, files): one line on stderr that says who is how far.

    Quiet unless stderr is a terminal. `update` may be called from any thread, with bytes.
    """

    def __init__(self, verb: str, unit: Callable[[float], str] = human_bytes, interval: float = 0.1) -> None:
        self._verb, self._unit, self._interval = verb, unit, interval
        self._parts: dict[str, tuple[int, int]] = {}
        self._last = self._start = time.monotonic()
        self._width = 0
        self._live = sys.stderr.isatty()

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._width:
            self._draw("")

    def update(self, part: str, done: int, total: int) -> None:
        self._parts[part] = (done, total)
        now = time.monotonic()
        if self._live and (now - self._last >= self._interval or done >= total):
            self._last = now
            self._draw(self._line(now))

    def _line(self, now: float) -> str:
        done = sum(d for d, _ in self._parts.values())
        total = sum(t for _, t in self._parts.values())
        share = min(done / total, 1.0) if total else 0.0
        bar = "#" * round(share * 24)
        busy = [name for name, (d, t) in self._parts.items() if name and d < t]
        rate = done / max(now - self._start, 1e-3)
        who = f" {', '.join(busy[:3])}" if busy else ""
        amount = f"{self._unit(done)} of {self._unit(total)}" if total else self._unit(done)
        return f"{self._verb} [{bar:<24}] {share:4.0%} {amount}, {self._unit(rate)}/s{who}"

    def _draw(self, line: str) -> None:
        import shutil

        line = line[: shutil.get_terminal_size().columns - 1]
        sys.stderr.write("\r" + line.ljust(self._width) + ("\r" if not line else ""))
        sys.stderr.flush()
        self._width = len(line)
