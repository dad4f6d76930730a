"""The KV cache of a stage: blocks of positions out of one pool a layer, taken as positions are forwarded.

A session's blocks are kept next to one another where possible, so that attention reads them as one slice; where they are
not, they are gathered. Sessions share the blocks of a common prefix; a shared block is copied before it is written.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from cake_core.errors import CapacityError
from cake_llama.config import KV_BLOCK

BLOCK = KV_BLOCK

_FREE_RUN = re.compile(rb"\x00+")


_versions = itertools.count(1)


@dataclass(slots=True)
class Table:
    """The blocks of one session, in order of position. `version` is another number whenever they are others."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0
    version: int = field(default_factory=lambda: next(_versions))

    def slots(self, start: int, stop: int) -> slice | list[int]:
        """Where positions start .. stop - 1 lie in the pool: a slice when they are neighbours."""
        first, last = start // BLOCK, (stop - 1) // BLOCK
        blocks = self.blocks[first : last + 1]
        if blocks[-1] - blocks[0] == last - first and all(b - a == 1 for a, b in pairwise(blocks)):
            begin = blocks[0] * BLOCK + start % BLOCK
            return slice(begin, begin + stop - start)
        return [self.blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(start, stop)]


class KvCache:
    """Pools of keys and values, [slots, kv_heads, head_dim] for each layer, and who has which blocks.

    In int8 each vector has its scale, f32 [slots, kv_heads]: the largest of its values over 127.
    """

    def __init__(self, layers: int, shape: tuple[int, int], blocks: int, device: torch.device, dtype: torch.dtype) -> None:
        self.blocks = blocks
        size = (blocks * BLOCK, *shape)
        # Memory is committed by the system as it is written, so an idle cache costs nothing on a CPU.
        self.keys = [torch.empty(size, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.empty(size, device=device, dtype=dtype) for _ in range(layers)]
        scaled = layers if dtype is torch.int8 else 0
        self.key_scales = [torch.empty(size[:2], device=device) for _ in range(scaled)]
        self.value_scales = [torch.empty(size[:2], device=device) for _ in range(scaled)]
        self._holders = bytearray(blocks)
        self._many: dict[int, int] = {}
        self._free = blocks

    @property
    def bytes_per_token(self) -> int:
        return sum(pool[:1].nbytes for pool in self._pools())

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """[T, kv_heads, head_dim] each, to the slots i64 [T]."""
        if not self.key_scales:
            self.keys[layer].index_copy_(0, slots, keys.to(self.keys[layer].dtype))
            self.values[layer].index_copy_(0, slots, values.to(self.values[layer].dtype))
            return
        for given, pool, scales in (
            (keys, self.keys[layer], self.key_scales[layer]), (values, self.values[layer], self.value_scales[layer]),
        ):  # fmt: skip
            codes, own = _narrowed(given)
            pool.index_copy_(0, slots, codes)
            scales.index_copy_(0, slots, own)

    def read(self, layer: int, where: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [slots, kv_heads, head_dim]."""
        keys, values = (pool[where].to(dtype) for pool in (self.keys[layer], self.values[layer]))
        if not self.key_scales:
            return keys, values
        scales = (pool[where].to(dtype)[..., None] for pool in (self.key_scales[layer], self.value_scales[layer]))
        return keys.mul_(next(scales)), values.mul_(next(scales))

    def _pools(self) -> tuple[Tensor, ...]:
        return (*self.keys, *self.values, *self.key_scales, *self.value_scales)

    @property
    def free_blocks(self) -> int:
        return self._free

    def needed(self, table: Table, length: int) -> int:
        """Blocks that `extend` would take, the copy of a shared last one included."""
        more = -(-length // BLOCK) - len(table.blocks)
        return max(0, more) + (1 if self._must_copy(table, length) else 0)

    def check_free(self, blocks: int) -> None:
        """Raises CapacityError unless so many blocks are free."""
        if blocks > self._free:
            raise CapacityError(
                f"the KV cache is full: {blocks * BLOCK} more positions are needed, {self._free * BLOCK} are free; "
                "wait for other requests, or give more with --kv-tokens"
            )

    def extend(self, table: Table, length: int) -> None:
        """Gives a session room for `length` positions. Raises CapacityError, with nothing taken, when there is not enough."""
        self.check_free(self.needed(table, length))
        if self._must_copy(table, length):
            self._copy_last(table)
        while len(table.blocks) * BLOCK < length:
            table.blocks.append(self._take(table.blocks[-1] if table.blocks else None))
            table.version = next(_versions)
        table.length = length

    def fork(self, parent: Table, length: int) -> Table:
        """A new session that shares the parent's first `length` positions."""
        kept = parent.blocks[: -(-length // BLOCK)]
        for block in kept:
            self._hold(block)
        return Table(list(kept), length)

    def truncate(self, table: Table, length: int) -> None:
        keep = -(-length // BLOCK)
        for block in table.blocks[keep:]:
            self._release(block)
        del table.blocks[keep:]
        table.length = length
        table.version = next(_versions)

    def _must_copy(self, table: Table, length: int) -> bool:
        """Whether the last block is shared and would be written."""
        return length > table.length and table.length % BLOCK != 0 and self._count(table.blocks[-1]) > 1

    def _copy_last(self, table: Table) -> None:
        old = table.blocks[-1]
        new = self._take(table.blocks[-2] if len(table.blocks) > 1 else None)
        for pool in self._pools():
            pool[new * BLOCK : (new + 1) * BLOCK] = pool[old * BLOCK : (old + 1) * BLOCK]
        self._release(old)
        table.blocks[-1] = new
        table.version = next(_versions)

    def _take(self, previous: int | None) -> int:
        """A free block: the one after `previous` if it is free, else in the middle of the longest free run, so that what
        stands before it can grow too."""
        block = -1 if previous is None else previous + 1
        if not 0 <= block < self.blocks or self._holders[block]:
            run = max(_FREE_RUN.finditer(self._holders), key=lambda m: m.end() - m.start())
            block = run.start() if run.start() == 0 else (run.start() + run.end()) // 2
        self._holders[block] = 1
        self._free -= 1
        return block

    def _count(self, block: int) -> int:
        return self._many.get(block, self._holders[block])

    def _hold(self, block: int) -> None:
        self._many[block] = self._count(block) + 1

    def _release(self, block: int) -> None:
        count = self._count(block) - 1
        if count > 1:
            self._many[block] = count
            return
        self._many.pop(block, None)
        if count == 0:
            self._holders[block] = 0
            self._free += 1


def _narrowed(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """i8 [T, heads, dim] and their scales f32 [T, heads]."""
    wide = vectors.to(torch.float32)
    most = wide.abs().amax(-1)
    return (wide * (127 / most.clamp(min=1e-30))[..., None]).round().to(torch.int8), most / 127
