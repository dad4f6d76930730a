"""A decode step as CUDA graphs: one for each batch size that occurs, captured when it first does.

A graph reads its inputs from tensors that never move and leaves its results in others; between two replays only a few
numbers a row are copied to the device. The token drawn last stays there, in the session's place of `last`, so the next step
can start before anybody has looked at it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from cake_llama.cache import BLOCK, KvCache, Table
from cake_llama.config import ModelConfig
from cake_llama.cuda.ops import Places, Scratch, add_norm, attend, gated_one, product_many, product_one, silu_mul
from cake_llama.model import Block, Linear, Norm, Parts
from cake_llama.narrow_matrix import NarrowLinear
from cake_llama.rotary import Rotary

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Batch sizes that get a graph; a batch takes the smallest that holds it."""
SLOTS = 1024
"""Places for sessions on the device. The first belongs to rows of a graph that nobody uses."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a step: `token` -1 takes what `slot` of `last` holds."""

    token: int
    position: int
    slot: int
    table: Table


@dataclass(slots=True)
class _Graph:
    inputs: Tensor  # i32 [B, 3]: token, position, slot
    hidden_in: Tensor  # [B, hidden_size]
    out: Tensor  # hidden [B, hidden_size], or logits f32 [B, vocabulary]
    best: Tensor | None  # i64 [B]: the most likely token, where the stage has the head
    scratch: Scratch  # a graph writes to addresses: what it uses has to live as long as it does
    graph: torch.cuda.CUDAGraph | None = None


def capturable(config: ModelConfig, parts: Parts) -> bool:
    """Whether every part is one that the graphs know."""
    known = Linear | NarrowLinear
    blocks_known = all(isinstance(p, known) for b in parts.blocks for p in (b.qkv, b.output, b.gate_up, b.down))
    head_known = parts.head is None or isinstance(parts.head, known)
    biased = any(b.gate_up.bias is not None for b in parts.blocks if isinstance(b.gate_up, known))
    grouped = config.num_heads // config.num_kv_heads <= 16
    return blocks_known and head_known and not biased and grouped and not config.rope.depends_on_length


class Graphs:
    """All graphs of one stage."""

    def __init__(
        self, config: ModelConfig, parts: Parts, cache: KvCache, rotary: Rotary, context: int, dtype: torch.dtype
    ) -> None:
        self._config = config
        self._parts = parts
        self._cache = cache
        self._context = context
        self._dtype = dtype
        self._device = rotary.device
        self._graphs: dict[int, _Graph] = {}
        self._pool: Any = None
        positions = torch.arange(context, device=self._device)
        cos, sin = rotary.angles(positions, positions + 1)
        self.angles = cos.contiguous(), sin.contiguous()
        """Of every position, f32 [context, half] each."""
        self.last = torch.zeros(SLOTS, dtype=torch.int64, device=self._device)
        """The token drawn last, by slot."""
        self._tables = torch.full((SLOTS, -(-context // BLOCK)), -1, dtype=torch.int32, device=self._device)
        """The blocks of each session, by slot."""
        self._shown = [0] * SLOTS  # which version of them

    def ready(self, rows: int) -> bool:
        """Whether the graph for so many rows exists; capturing one allows no other work on the device."""
        return next(size for size in SIZES if size >= rows) in self._graphs

    def run(self, entries: Sequence[Entry], hidden: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Launches a step and returns (hidden states or f32 logits, most likely tokens), valid until the next step.

        `hidden` may be on the host (`wire.on_host` for a device).
        """
        size = next(size for size in SIZES if size >= len(entries))
        graph = self._graphs.get(size)
        if graph is None:
            graph = self._graphs[size] = self._capture(size)
        rows = [(e.token, e.position, e.slot) for e in entries] + [(0, 0, 0)] * (size - len(entries))
        graph.inputs.copy_(torch.tensor(rows, dtype=torch.int32), non_blocking=True)
        self._show_tables(entries)
        if hidden is not None:
            graph.hidden_in[: len(entries)].copy_(hidden, non_blocking=True)
        if graph.graph is not None:
            graph.graph.replay()
        count = len(entries)
        return graph.out[:count], None if graph.best is None else graph.best[:count]

    def _show_tables(self, entries: Sequence[Entry]) -> None:
        """Brings the device's tables up to date: those of sessions whose blocks changed since their last step."""
        for entry in entries:
            if self._shown[entry.slot] != entry.table.version:
                self._shown[entry.slot] = entry.table.version
                blocks = torch.tensor(entry.table.blocks, dtype=torch.int32)
                self._tables[entry.slot, : len(blocks)].copy_(blocks, non_blocking=True)

    def _capture(self, size: int) -> _Graph:
        config, device = self._config, self._device
        inputs = torch.zeros((size, 3), dtype=torch.int32, device=device)
        hidden_in = torch.zeros((size, config.hidden_size), dtype=self._dtype, device=device)
        scratch = Scratch.make(size, config.num_heads, config.num_kv_heads, config.head_dim, hidden_in)
        graph = _Graph(inputs, hidden_in, hidden_in, None, scratch)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles the kernels, and lets cuBLAS make its workspaces outside the capture
                self._step(graph, scratch)
        torch.cuda.current_stream(device).wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, pool=self._pool, capture_error_mode="thread_local"):
            graph.out, graph.best = self._step(graph, scratch)
        self._pool = captured.pool()
        graph.graph = captured
        return graph

    def _step(self, graph: _Graph, scratch: Scratch) -> tuple[Tensor, Tensor | None]:
        parts, inputs = self._parts, graph.inputs
        if parts.embedding is not None:
            ids = torch.where(inputs[:, 0] < 0, self.last[inputs[:, 2]], inputs[:, 0].to(torch.int64))
            x = parts.embedding[ids].to(self._dtype)
        else:
            x = graph.hidden_in.clone()
        places = Places(inputs, self._tables, *self.angles)
        run = self._blocks_one if len(x) == 1 else self._blocks_many
        x, delta = run(x, places, scratch)
        if parts.norm is None:
            return (x if delta is None else x + delta.sum(0).to(x.dtype)), None
        if parts.head is None:
            return add_norm(x, delta, parts.norm), None
        logits = self._logits(x, delta, parts.norm, cast("Linear | NarrowLinear", parts.head))
        best = most_likely(logits)
        if parts.embedding is not None:
            self.last.index_copy_(0, inputs[:, 2].to(torch.int64), best)
        return logits, best

    def _logits(self, x: Tensor, delta: Tensor | None, norm: Norm, head: Linear | NarrowLinear) -> Tensor:
        if len(x) == 1:
            return product_one(x, head, norm, dtype=torch.float32)
        return product_many(add_norm(x, delta, norm), head).sum(0, dtype=torch.float32)

    def _blocks_one(self, x: Tensor, places: Places, scratch: Scratch) -> tuple[Tensor, Tensor | None]:
        for block in self._parts.blocks:
            qkv, output, gate_up, down = _products(block)
            attended = self._attend(block, product_one(x, qkv, block.input_norm)[None], places, scratch)
            x = product_one(attended, output, residual=x)
            x = product_one(gated_one(x, gate_up, block.post_norm), down, residual=x)
        return x, None

    def _blocks_many(self, x: Tensor, places: Places, scratch: Scratch) -> tuple[Tensor, Tensor | None]:
        delta: Tensor | None = None
        for block in self._parts.blocks:
            qkv, output, gate_up, down = _products(block)
            normed = add_norm(x, delta, block.input_norm)
            attended = self._attend(block, product_many(normed, qkv), places, scratch)
            normed = add_norm(x, product_many(attended, output), block.post_norm)
            delta = product_many(silu_mul(product_many(normed, gate_up), x.dtype), down)
        return x, delta

    def _attend(self, block: Block, qkv: Tensor, places: Places, scratch: Scratch) -> Tensor:
        norms = None
        if block.q_norm is not None and block.k_norm is not None:
            norms = (block.q_norm, block.k_norm)
        cache = (self._cache.keys[block.index], self._cache.values[block.index])
        return attend(qkv, cache, places, scratch, norms, block.window)


def most_likely(logits: Tensor) -> Tensor:
    """[B, vocabulary] -> i64 [B]: argmax in two steps where it can be, since one reads a row with one multiprocessor."""
    batch, size = logits.shape
    part = math.gcd(size, 512)
    if part < 64:
        return logits.argmax(-1)
    values, places = logits.view(batch, -1, part).max(-1)
    first = values.argmax(-1)
    return first * part + places.gather(1, first[:, None])[:, 0]


def _products(block: Block) -> Sequence[Linear | NarrowLinear]:
    return cast("Sequence[Linear | NarrowLinear]", (block.qkv, block.output, block.gate_up, block.down))
