"""The tensors of a batch, from what its sequences know. Pure."""

from __future__ import annotations

from cake_core.engine.step import Step
from cake_core.model import SAMPLED, Batch, Tensor, int32_tensor


def batch_of(step: Step) -> Batch:
    """The rows of a step with their tokens, and their targets where one is scored."""
    return Batch(tuple(step.rows), _inputs(step))


def _inputs(step: Step) -> dict[str, Tensor]:
    tokens: list[int] = []
    targets: list[int] = []
    for sequence, row in zip(step.sequences, step.rows, strict=True):
        stop = row.position + row.length
        # What has not been drawn yet is taken where it will be.
        tokens += sequence.tokens[row.position : stop] or [SAMPLED]
        tokens += sequence.guesses
        if row.want.score:
            known = [*sequence.tokens[row.position + 1 : min(stop + 1, sequence.prompt_length)]]
            targets += known + [-1] * (row.length - len(known))
        else:
            targets += [-1] * row.length
    tensors = {"tokens": int32_tensor(tokens)}
    if any(row.want.score for row in step.rows):
        tensors["targets"] = int32_tensor(targets)
    return tensors
