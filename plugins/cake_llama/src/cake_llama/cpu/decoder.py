"""Positions of a batch through all blocks of a stage in one call, in C.

Where the kernels cannot do what the blocks do, the model's own code serves, whose projections are `NativeLinear`s: the same
products.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import cake_kernels
from cake_llama.cache import BLOCK, KvCache
from cake_llama.cpu.linear import NativeLinear
from cake_llama.model import Parts

if TYPE_CHECKING:
    from cake_llama.attention import RowPlan, StepPlan
    from cake_llama.config import ModelConfig
    from cake_llama.model import Block

PASS_ROWS = 512
"""Positions a call: what bounds its memory."""

KV_TYPES = {
    torch.float32: cake_kernels.TYPES["F32"], torch.float16: cake_kernels.TYPES["F16"],
    torch.bfloat16: cake_kernels.TYPES["BF16"], torch.int8: cake_kernels.INT8,
}  # fmt: skip


class Decoder:
    """All blocks of a stage as one call. Their weights and the cache stay where they are."""

    def __init__(self, config: ModelConfig, blocks: Sequence[Block], cache: KvCache, pool: cake_kernels.Pool) -> None:
        self._pool = pool
        self._blocks = blocks  # their memory is pointed into
        self._shape = cake_kernels.Shape(
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            inner=config.intermediate_size,
            rotary_dim=config.rope.dim,
            activation=0,
            kv_type=KV_TYPES[cache.keys[0].dtype],
            kv_block=BLOCK,
            norm_eps=config.norm_eps,
            scale=config.head_dim**-0.5,
        )
        self._layers = (cake_kernels.Layer * len(blocks))(*(_layer(block, cache) for block in blocks))

    def __call__(self, hidden: Tensor, plan: StepPlan) -> Tensor:
        """f32 [T, hidden_size] through the blocks; the rows' keys and values are written to the cache."""
        x = hidden.to(torch.float32, copy=True).contiguous()
        start = 0
        for runs in _passes(plan.rows):
            count = sum(run.length for run in runs)
            own = slice(start, start + count)
            self._forward(runs, plan.cos[own], plan.sin[own], x[own])
            start += count
        return x

    def _forward(self, runs: Sequence[_Run], cos: Tensor, sin: Tensor, x: Tensor) -> None:
        positions, lengths = array("i"), array("i", [run.length for run in runs])
        width = max(len(run.blocks) for run in runs)
        tables = array("i", bytes(4 * width * len(runs)))
        for index, run in enumerate(runs):
            positions.extend(range(run.position, run.position + run.length))
            tables[index * width : index * width + len(run.blocks)] = array("i", run.blocks)
        step = cake_kernels.Step(
            len(x), len(runs), width, *(numbers.buffer_info()[0] for numbers in (positions, lengths, tables)),
            cos.data_ptr(), sin.data_ptr(),
        )  # fmt: skip
        self._pool.decode(self._shape, self._layers, step, x.data_ptr())


@dataclass(frozen=True, slots=True)
class _Run:
    """Successive positions of one session."""

    position: int
    length: int
    blocks: Sequence[int]


def _passes(rows: Sequence[RowPlan]) -> Iterator[list[_Run]]:
    """All positions in order, at most PASS_ROWS at a time."""
    runs, room = list[_Run](), PASS_ROWS
    for row in rows:
        position, end = row.position, row.position + row.length
        while position < end:
            length = min(room, end - position)
            runs.append(_Run(position, length, row.table.blocks))
            position, room = position + length, room - length
            if room == 0:
                yield runs
                runs, room = [], PASS_ROWS
    if runs:
        yield runs


def make_decoder(config: ModelConfig, blocks: Sequence[Block], cache: KvCache) -> Decoder | None:
    """A decoder where the kernels can do what the blocks do, else None: the model's own code serves."""
    suits = config.head_dim % 32 == 0 or (config.head_dim % 16 == 0 and config.num_heads // config.num_kv_heads % 2 == 0)
    if not blocks or not suits or cache.keys[0].dtype not in KV_TYPES:
        return None
    pools = [pool for block in blocks for pool in _pools(block)]
    if pools[0] is None or any(pool is not pools[0] for pool in pools):
        return None
    return Decoder(config, blocks, cache, pools[0])


def _pools(block: Block) -> list[cake_kernels.Pool | None]:
    """Of each projection that the decoder needs in its own matrices; None for one that is made otherwise or wants its input
    in another order."""
    wanted = ((block.qkv, 3), (block.output, 1), (block.gate_up, 2), (block.down, 1))
    return [p.pool if isinstance(p, NativeLinear) and p.in_order and len(p.parts) == parts else None for p, parts in wanted]


def _layer(block: Block, cache: KvCache) -> cake_kernels.Layer:
    qkv, output, gate_up, down = block.qkv, block.output, block.gate_up, block.down
    native = [p for p in (qkv, output, gate_up, down) if isinstance(p, NativeLinear)]
    names = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
    fields = {
        field: value
        for linear, parts in zip(native, names, strict=True)
        for index, name in enumerate(parts)
        for field, value in ((name, linear.parts[index].matrix), (f"{name}_bias", linear.bias_of(index)))
    }
    norms = {"attention": block.input_norm, "mlp": block.post_norm, "q": block.q_norm, "k": block.k_norm}
    return cake_kernels.Layer(
        **fields,
        **{f"{name}_norm": norm.weight.data_ptr() for name, norm in norms.items() if norm is not None},
        keys=cache.keys[block.index].data_ptr(),
        values=cache.values[block.index].data_ptr(),
        key_scale=cache.key_scales[block.index].data_ptr() if cache.key_scales else None,
        value_scale=cache.value_scales[block.index].data_ptr() if cache.value_scales else None,
        window=block.window or 0,
    )


@dataclass(slots=True)
class NativeParts(Parts):
    """Parts whose blocks are run by a decoder."""

    decoder: Decoder = field(kw_only=True)

    def through_blocks(self, hidden: Tensor, plan: StepPlan, cache: KvCache) -> Tensor:
        return self.decoder(hidden, plan)
