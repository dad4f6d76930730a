"""How much of the KV cache's memory no session can use."""

from __future__ import annotations

from random import Random

import torch

from cake_core.errors import CapacityError
from cake_llama.cache import BLOCK, KvCache, Table


def test_at_mixed_lengths_at_most_one_percent_of_the_cache_is_unusable() -> None:
    """Sessions of 100 to 8,000 positions that come, grow to their length a piece at a time and go, in a cache that stays full.

    Only what is over in a session's last block is lost: whatever is free can be had, wherever it lies."""
    rng = Random(5)
    cache = KvCache(0, (1, 1), 4096, torch.device("cpu"), torch.float32)
    total = cache.blocks * BLOCK
    live, worst = list[Table](), 0.0
    for _ in range(300):
        table, length = Table(), rng.randint(100, 8000)
        try:
            for end in range(min(512, length), length + 512, 512):
                cache.extend(table, min(end, length))
            live.append(table)
        except CapacityError:
            rest = Table()
            cache.extend(rest, cache.free_blocks * BLOCK)  # all that is free is of use
            assert cache.free_blocks == 0
            used = sum(one.length for one in (*live, table, rest))
            worst = max(worst, 1 - used / total)
            for one in (table, rest, live.pop(rng.randrange(len(live)))):
                cache.truncate(one, 0)
    assert 0 < worst < 0.01
    for one in live:
        cache.truncate(one, 0)
    assert cache.free_blocks == cache.blocks
