"""CBOR (RFC 8949) from a peer, checked before any codec sees it.

A codec's own limits differ between versions, and its built-in tags make objects of what a peer sends. Only definite
lengths, no tags, limited depth and exactly one item pass.
"""

from __future__ import annotations

from typing import Any

import cbor2

from cake_core.errors import ProtocolError

MAX_DEPTH = 8


def load_map(data: bytes) -> dict[str, Any]:
    """The map with text keys in `data`. Raises ProtocolError for anything else."""
    check_cbor(data)
    try:
        values = cbor2.loads(data)
    except Exception as error:
        # Whatever the codec raises for bytes it does not like, they came from the peer.
        raise ProtocolError("a damaged header") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ProtocolError("a header that is no map")
    return values


def check_cbor(data: bytes) -> None:
    """One pass over CBOR (RFC 8949) before any codec sees it: definite lengths, no tags, at most MAX_DEPTH deep, one item.

    A codec's own limits differ between versions, and its built-in tags make objects of what a peer sends.
    """
    position, open_items = 0, [1]
    while open_items:
        open_items[-1] -= 1
        if position >= len(data):
            raise ProtocolError("a truncated header")
        major, info = data[position] >> 5, data[position] & 31
        position += 1
        argument = info
        if 24 <= info <= 27:
            width = 1 << (info - 24)
            argument = int.from_bytes(data[position : position + width], "big")
            position += width
        elif info > 27:
            raise ProtocolError("a header with an indefinite length")
        if major == 6:
            raise ProtocolError("a header with a CBOR tag")
        if major in (2, 3):
            position += argument
        elif major in (4, 5) and argument:
            if len(open_items) > MAX_DEPTH or argument > len(data):
                raise ProtocolError("a header nested too deep or too long")
            open_items.append(argument * (2 if major == 5 else 1))
        if position > len(data):
            raise ProtocolError("a truncated header")
        while open_items and not open_items[-1]:
            open_items.pop()
    if position != len(data):
        raise ProtocolError("bytes after the end of a header")
