"""Names that others give and that become paths here: a peer's manifest, the index of a foreign model, the listing of a hub.

What is refused is refused on every system alike: a model that opens on one machine of a cluster opens on all.
"""

from __future__ import annotations

import re

MAX_NAME_BYTES = 255

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+ ()-]{0,126}[A-Za-z0-9_)-]|[A-Za-z0-9_]")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def is_file_name(text: object) -> bool:
    """Whether this can name something inside a folder, in whatever script: no separator, drive, `..`, NUL, device of Windows,
    nothing that Windows would shorten to something else, nothing too long."""
    return (
        isinstance(text, str)
        and text.isprintable()
        and 0 < len(text.encode()) <= MAX_NAME_BYTES
        and not set("/\\:") & set(text)
        and not text.endswith((".", " "))
        and not _RESERVED.fullmatch(text)
    )


def is_safe_path(text: object) -> bool:
    """Whether this is `name` or `folder/name` of plain characters: nothing that leads out of the folder it is put into, on any
    system (no `..`, no absolute path, drive, device, NUL or empty name, nothing hidden, at most 128 characters a part)."""
    if not isinstance(text, str):
        return False
    parts = text.split("/")
    return len(parts) <= 2 and all(_PART.fullmatch(part) and not _RESERVED.fullmatch(part) for part in parts)
