"""Rows of several positions through the layers of a stage: prompt chunks, and guesses with what they follow. Launched without
waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cake_llama.attention import RowPlan, attend_written
from cake_llama.cache import KvCache
from cake_llama.config import ModelConfig
from cake_llama.cuda.ops import add_norm, silu_mul, turn
from cake_llama.model import Block, Parts


class Prompts:
    """`angles`: cosines and sines of every position, f32 [context, half]."""

    def __init__(
        self, config: ModelConfig, parts: Parts, cache: KvCache, angles: tuple[Tensor, Tensor], dtype: torch.dtype
    ) -> None:
        self._config = config
        self._parts = parts
        self._cache = cache
        self._angles = angles
        self._dtype = dtype
        self._device = angles[0].device
        self._pinned = self._device.type == "cuda"

    def run(self, rows: Sequence[RowPlan], tokens: Sequence[int], hidden: Tensor | None) -> Tensor:
        """[T] ids, or hidden states [T, hidden_size] that may be overwritten, through this stage's layers, the head left out.

        The cache has room for the rows' positions.
        """
        places = self._places(rows)
        if self._parts.embedding is not None:
            ids = torch.tensor(tokens, pin_memory=self._pinned).to(self._device, non_blocking=True)
            hidden = self._parts.embedding[ids].to(self._dtype)
        assert hidden is not None  # noqa: S101 - the stage has checked its inputs
        x, delta = hidden, None
        for block in self._parts.blocks:
            normed = add_norm(x, delta, block.input_norm)
            delta = block.output(self._attend(block, block.qkv(normed), rows, places))[None]
            normed = add_norm(x, delta, block.post_norm)
            delta = block.down(silu_mul(block.gate_up(normed)[None], x.dtype))[None]
        if self._parts.norm is not None:
            return add_norm(x, delta, self._parts.norm)
        return x if delta is None else x.add_(delta[0])

    def _attend(self, block: Block, qkv: Tensor, rows: Sequence[RowPlan], places: Tensor) -> Tensor:
        norms = None
        if block.q_norm is not None and block.k_norm is not None:
            norms = (block.q_norm, block.k_norm)
        cache = (self._cache.keys[block.index], self._cache.values[block.index])
        q = turn(qkv, cache, places, self._angles, self._config.num_heads, norms)
        return attend_written(rows, self._cache, block.index, q, block.window)

    def _places(self, rows: Sequence[RowPlan]) -> Tensor:
        """i32 [2, T]: positions, and where their keys lie."""
        total = sum(row.length for row in rows)
        places = torch.empty((2, total), dtype=torch.int32, pin_memory=self._pinned)
        for row in rows:
            own, end = slice(row.start, row.start + row.length), row.position + row.length
            places[0, own] = torch.arange(row.position, end)
            if self._cache.keys:
                slots = row.table.slots(row.position, end)
                places[1, own] = torch.arange(slots.start, slots.stop) if isinstance(slots, slice) else torch.tensor(slots)
        return places.to(self._device, non_blocking=True)
