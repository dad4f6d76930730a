"""Writes small GGUF files from Python values, for tests of whatever reads them."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cake_core.formats.gguf_header import DEFAULT_ALIGNMENT, TYPES

_NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}

Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]
"""Name -> (type like `Q4_K`, shape outermost first, data)."""


def write_toy_gguf(path: Path, metadata: Mapping[str, Any], tensors: Tensors, version: int = 3) -> Path:
    """Whole numbers become u32, or i64 where that is too short; lists hold texts, whole numbers (i32) or floats."""
    alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(metadata))
    head += b"".join(_text(key) + _entry(value) for key, value in metadata.items())
    body = b""
    for name, (dtype, shape, data) in tensors.items():
        head += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), _NUMBERS[dtype], len(body))
        body += data + bytes(-len(data) % alignment)
    path.write_bytes(head + bytes(-len(head) % alignment) + body)
    return path


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _entry(value: Any) -> bytes:
    kind, data = _value(value)
    return struct.pack("<I", kind) + data


def _value(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, str):
        return 8, _text(value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, int):
        return (4, struct.pack("<I", value)) if 0 <= value < 1 << 32 else (11, struct.pack("<q", value))
    return 9, _array(value)


def _array(values: Sequence[Any]) -> bytes:
    if all(isinstance(value, str) for value in values):
        return struct.pack("<IQ", 8, len(values)) + b"".join(map(_text, values))
    kind, code = (5, "i") if all(isinstance(value, int) for value in values) else (6, "f")
    return struct.pack(f"<IQ{len(values)}{code}", kind, len(values), *values)
