"""Caches as a decode step leaves them: for whoever measures what comes between two of them."""

from __future__ import annotations

from collections.abc import Callable

NBYTES, LITTLE = 256 << 20, 64 << 20
"""More than most processors keep: what they are said to have is not all, with page tables and the rest of a shared host. And
enough to sweep code and small tables."""


def sweep(nbytes: int = NBYTES) -> Callable[[], object]:
    """Reads so many bytes of memory each time it is called, as the weights of a stage are: afterwards the caches hold nothing
    else. Takes the memory once, milliseconds a call."""
    memory = bytearray(b"\1") * nbytes
    return lambda: memory.find(2)
