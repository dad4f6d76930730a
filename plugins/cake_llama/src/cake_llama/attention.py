"""Attention of the rows of a batch over their sessions' caches: the one place that reads and writes the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cake_llama.cache import KvCache, Table


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
        where = slots if isinstance(slots, slice) else torch.tensor(slots, device=device)
        if self.length == 1:
            return where, None
        queries = torch.arange(self.position, end, device=device)[:, None]
        keys = torch.arange(begin, end, device=device)[None, :]
        mask = keys <= queries
        return where, mask if window is None else mask & (keys > queries - window)


@dataclass(slots=True)
class StepPlan:
    """What the layers share in one step: rows, slots to write, angles."""

    rows: Sequence[RowPlan]
    slots: Tensor
    cos: Tensor
    sin: Tensor


def attend(plan: StepPlan, cache: KvCache, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Writes k, v [T, kv_heads, head_dim] to the cache and attends with q [T, heads, head_dim]; returns [T, heads * head_dim].

    `window`: positions a query sees, itself included; None for all.
    """
    keys, values = cache.keys[layer], cache.values[layer]
    keys.index_copy_(0, plan.slots, k.to(keys.dtype))
    values.index_copy_(0, plan.slots, v.to(values.dtype))
    tokens, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    out = torch.empty((tokens, heads * head_dim), dtype=q.dtype, device=q.device)
    for row in plan.rows:
        where, mask = row.view(window, q.device)
        own = slice(row.start, row.start + row.length)
        # Heads that share keys are folded: [1, kv_heads, group * length, head_dim] against [1, kv_heads, keys, head_dim].
        folded = q[own].view(row.length, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
        k_row = keys[where].to(q.dtype).transpose(0, 1)
        v_row = values[where].to(q.dtype).transpose(0, 1)
        if row.length == 1:
            attended = scaled_dot_product_attention(folded.squeeze(2)[None], k_row[None], v_row[None])
            out[own] = attended.reshape(1, -1)
        else:
            group = heads // kv_heads
            wide = (kv_heads, group, k_row.shape[1], head_dim)
            attended = scaled_dot_product_attention(
                folded, k_row[:, None].expand(wide), v_row[:, None].expand(wide), attn_mask=mask
            )
            out[own] = attended.permute(2, 0, 1, 3).reshape(row.length, -1)
    return out
