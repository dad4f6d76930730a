"""Attention of the rows of a batch over their sessions' caches: the one place that reads and writes the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from cake_llama.cache import KvCache, Table
from cake_llama.rotary import for_rotation


@dataclass(slots=True)
class RowPlan:
    """One row: its place in the batch, its positions, and where its keys lie."""

    start: int
    length: int
    position: int
    table: Table
    _views: dict[int | None, tuple[slice | Tensor, Tensor | None]] = field(default_factory=dict)

    def view(self, window: int | None, device: torch.device) -> tuple[slice | Tensor, Tensor | None]:
        """Slots of the keys it attends to, and the mask [length, keys] (None: all of them). The same for every layer."""
        found = self._views.get(window)
        if found is None:
            found = self._views[window] = self._make_view(window, device)
        return found

    def _make_view(self, window: int | None, device: torch.device) -> tuple[slice | Tensor, Tensor | None]:
        end = self.position + self.length
        begin = 0 if window is None else max(0, self.position - window + 1)
        slots = self.table.slots(begin, end)
        where = slots if isinstance(slots, slice) else torch.tensor(slots).to(device, non_blocking=True)
        if self.length == 1:
            return where, None
        if window is None and device.type == "cuda":
            return where, causal_lower_right(self.length, end)
        queries = torch.arange(self.position, end, device=device)[:, None]
        keys = torch.arange(begin, end, device=device)[None, :]
        mask = keys <= queries
        return where, mask if window is None else mask & (keys > queries - window)


@dataclass(slots=True)
class StepPlan:
    """What the layers share in one step: rows, and the cos and sin of every position, f32 [T, dim / 2]. `drawn`: a token is
    drawn after every position, as in decode steps with and without guesses. What only PyTorch's own layers need is made when
    they first ask for it."""

    rows: Sequence[RowPlan]
    cos: Tensor
    sin: Tensor
    drawn: bool = False
    _slots: Tensor | None = None
    _turns: tuple[Tensor, Tensor] | None = None

    @property
    def slots(self) -> Tensor:
        """Where the keys and values of every position are written: i64 [T]."""
        if self._slots is None:
            found: list[int] = []
            for row in self.rows:
                where = row.table.slots(row.position, row.position + row.length)
                found += range(where.start, where.stop) if isinstance(where, slice) else where
            self._slots = torch.tensor(found, device=self.cos.device)
        return self._slots

    def turns(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Angles as `rotate_` takes them. The same for every layer, which all compute in one dtype."""
        if self._turns is None:
            self._turns = for_rotation(self.cos, self.sin, dtype)
        return self._turns


def attend(plan: StepPlan, cache: KvCache, layer: int, qkv: Tensor, window: int | None) -> Tensor:
    """Writes keys and values to the cache of a layer and attends with the queries: [T, heads * head_dim].

    `qkv` is [T, heads + 2 * kv_heads, head_dim]; `window`: positions a query sees, itself included; None for all.
    """
    kv_heads = cache.keys[layer].shape[1]
    heads = qkv.shape[1] - 2 * kv_heads
    cache.write(layer, plan.slots, qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :])
    return attend_written(plan.rows, cache, layer, qkv[:, :heads], window)


def attend_written(rows: Sequence[RowPlan], cache: KvCache, layer: int, q: Tensor, window: int | None) -> Tensor:
    """The queries [T, heads, head_dim] of rows whose keys and values are in the cache: [T, heads * head_dim]."""

    def attended(row: RowPlan, own: Tensor) -> Tensor:
        where, mask = row.view(window, own.device)
        return _attend_row(own, *cache.read(layer, where, own.dtype), mask)

    if len(rows) == 1:
        return attended(rows[0], q)
    return torch.cat([attended(row, q[row.start : row.start + row.length]) for row in rows])


def _attend_row(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """One row's queries [length, heads, head_dim] against its keys and values: [length, heads * head_dim]."""
    length, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    k, v = keys.transpose(0, 1), values.transpose(0, 1)  # [kv_heads, keys, head_dim] each
    if length == 1:
        # The queries that share a head's keys stand as its sequence, so nothing is repeated.
        queries = q.reshape(1, kv_heads, heads // kv_heads, head_dim)
        return scaled_dot_product_attention(queries, k[None], v[None]).reshape(1, -1)
    if isinstance(mask, CausalBias):
        # Flash attention knows this mask and shared heads; it neither builds the one nor repeats the other.
        attended = scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, enable_gqa=True)
        return attended[0].transpose(0, 1).reshape(length, -1)
    queries = q.reshape(length, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
    wide = (kv_heads, heads // kv_heads, k.shape[1], head_dim)
    attended = scaled_dot_product_attention(queries, k[:, None].expand(wide), v[:, None].expand(wide), attn_mask=mask)
    return attended.permute(2, 0, 1, 3).reshape(length, -1)
