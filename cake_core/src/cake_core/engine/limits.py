"""What the scheduler may do by default, from where the stages are."""

from __future__ import annotations

from collections.abc import Sequence

from cake_core.engine.scheduler import Limits
from cake_core.stages.stage import RemoteStage, Stage

CHUNK, GPU_CHUNK = 512, 2048
"""Prompt positions a batch: what nobody else has to wait for longer than."""
PIECE, GPU_PIECE = 64, 1024
"""Prompt positions below which a batch costs no less: reading the weights takes longer than computing with them."""
ROWS, GPU_ROWS = 64, 128
"""Sequences that are decoded at once: on a GPU a step of many takes hardly longer than a step of one."""


def fitting_limits(stages: Sequence[Stage]) -> Limits:
    """As many batches in flight as there are nodes with a KV cache, the others having next to nothing to do; of prompts, in
    smaller pieces, enough to fill the wires as well. Where every stage is on a GPU larger chunks, as small ones leave it idle,
    and one batch more, as the time between two stages is much beside theirs."""
    memories = [stage.memory() for stage in stages]
    fast = all(device.startswith("cuda") for memory in memories for device in memory.device.split(","))
    nodes = len({stage.node for stage, memory in zip(stages, memories, strict=True) if memory.kv_tokens}) or 1
    rows, chunk, piece = (GPU_ROWS, GPU_CHUNK, GPU_PIECE) if fast else (ROWS, CHUNK, PIECE)
    if not any(isinstance(stage, RemoteStage) for stage in stages):
        return Limits(rows=rows, chunk=chunk, piece=piece)
    return Limits(rows=rows, depth=nodes + fast, chunk=chunk, piece=piece, pieces=8 * nodes, chunks=4 * nodes)
