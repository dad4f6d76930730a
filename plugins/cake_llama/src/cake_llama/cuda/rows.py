"""A batch's rows of one position and its longer ones, which are computed apart: taken from one another and put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cake_llama.stage import Step


def rows_of(hidden: Tensor, steps: Sequence[Step]) -> Tensor:
    """The positions of these rows, one after another."""
    return torch.cat([hidden[step.start : step.start + step.row.length] for step in steps])


def woven(steps: Sequence[Step], singles: Tensor | None, longer: Tensor | None, count: Callable[[Step], int]) -> Tensor:
    """In the order of the batch, `count` rows of each step: of `singles` [n, width] or of `longer` [their counts, width]."""
    if singles is None and longer is not None:
        return longer
    if singles is not None and all(step.row.length == 1 == count(step) for step in steps):
        return singles
    ones = iter(() if singles is None else singles[:, None])
    counts = [count(step) for step in steps if step.row.length > 1]
    others = iter(() if longer is None else torch.split(longer, counts))
    return torch.cat([(next(ones) if step.row.length == 1 else next(others))[: count(step)] for step in steps])


def draws_left(drawn: Sequence[Step]) -> Sequence[int]:
    """For each draw, those of a step one after another, how many of the same step follow."""
    left, found = dict[int, int](), list[int]()
    for step in reversed(drawn):
        found.append(left.get(step.row.session, 0))
        left[step.row.session] = found[-1] + 1
    return found[::-1]
