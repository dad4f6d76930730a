"""What fills the caches between two measurements reads all of its memory."""

from __future__ import annotations

import tracemalloc

from cake_core.caches import sweep


def test_every_byte_is_read_and_nothing_is_taken_anew():
    clear = sweep(1 << 20)
    tracemalloc.start()
    try:
        assert clear() == -1  # looked for to the very end
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()
