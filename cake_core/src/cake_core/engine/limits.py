"""What the scheduler may do by default, from where the stages are."""

from __future__ import annotations

from collections.abc import Sequence

from cake_core.engine.scheduler import Limits
from cake_core.stages import RemoteStage, Stage

CHUNK, GPU_CHUNK = 512, 2048
"""Prompt positions a batch: what nobody else has to wait for longer than."""


def fitting_limits(stages: Sequence[Stage]) -> Limits:
    """As many batches in flight as there are workers; larger prompt chunks where every stage is on a GPU, which a small one
    leaves idle."""
    remote = sum(isinstance(stage, RemoteStage) for stage in stages)
    fast = all(stage.memory().device.startswith("cuda") for stage in stages)
    return Limits(depth=max(1, remote), chunk=GPU_CHUNK if fast else CHUNK)
