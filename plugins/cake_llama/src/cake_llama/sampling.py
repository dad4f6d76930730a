"""Drawing tokens on the device that made the logits, exactly as `cake_core.sampling` defines it (everything in f64)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from cake_core.errors import RequestError, StageError
from cake_core.requests import SamplingParams
from cake_core.sampling import uniform

_FEW = 1024
"""Candidates looked at before all of a vocabulary is sorted."""


def draw(logits: Tensor, params: SamplingParams, history: Sequence[int], prompt_length: int, choice: int) -> int:
    """One token from logits [vocabulary]; `history` is every token so far."""
    if params.temperature == 0 and not _changes_logits(params, len(history) - prompt_length):
        return _most_likely(logits)
    scores = _penalised(logits.to(torch.float64), params, history, prompt_length)
    if params.temperature == 0:
        return _most_likely(scores)
    best = scores.max()
    if not math.isfinite(best.item()):
        raise _not_numbers()
    weights = ((scores - best) / params.temperature).exp()
    ids, kept = _kept(weights, params)
    if len(ids) == 1:
        return int(ids[0])
    sums = kept.cumsum(0)
    threshold = uniform(params.seed, choice, len(history)) * sums[-1]
    index = torch.searchsorted(sums, threshold, right=True)
    return int(ids[min(int(index), len(ids) - 1)])


def _not_numbers() -> StageError:
    return StageError("the model's logits are not numbers, or every token is ruled out; try another dtype or fewer bans")


def _most_likely(logits: Tensor) -> int:
    """The lowest of the most likely ids; if there is one that is no number, that one, which is refused."""
    # On a CPU numpy is ten times as fast as PyTorch.
    token = int(logits.numpy().argmax() if logits.device.type == "cpu" else logits.max(0).indices)
    if not math.isfinite(logits[token].item()):
        raise _not_numbers()
    return token


def _changes_logits(params: SamplingParams, generated: int) -> bool:
    return bool(
        params.logit_bias
        or (params.banned_until and generated < params.min_tokens)
        or (params.repeat_penalty != 1 and params.repeat_last_n)
        or params.frequency_penalty
        or params.presence_penalty
    )


def _penalised(scores: Tensor, params: SamplingParams, history: Sequence[int], prompt_length: int) -> Tensor:
    """f64 logits after bans, bias and penalties, changed in place."""
    size = len(scores)
    if len(history) - prompt_length < params.min_tokens and params.banned_until:
        scores[_ids(params.banned_until, size, "banned_until", scores.device)] = -math.inf
    if params.logit_bias:
        ids = _ids([token for token, _ in params.logit_bias], size, "logit_bias", scores.device)
        scores.index_add_(0, ids, scores.new_tensor([value for _, value in params.logit_bias]))
    if params.repeat_penalty != 1 and params.repeat_last_n:
        recent = history if params.repeat_last_n < 0 else history[-params.repeat_last_n :]
        ids = torch.tensor(sorted(set(recent)), device=scores.device)
        values = scores[ids]
        scores[ids] = torch.where(values > 0, values / params.repeat_penalty, values * params.repeat_penalty)
    if params.frequency_penalty or params.presence_penalty:
        counts = Counter(history[prompt_length:])
        if counts:
            ids = torch.tensor(list(counts), device=scores.device)
            off = [count * params.frequency_penalty + params.presence_penalty for count in counts.values()]
            scores[ids] -= scores.new_tensor(off)
    return scores


def _ids(tokens: Sequence[int], size: int, name: str, device: torch.device) -> Tensor:
    outside = next((t for t in tokens if not 0 <= t < size), None)
    if outside is not None:
        raise RequestError(f"{name} names token {outside}, but the model's ids end at {size - 1}", name)
    return torch.tensor(tokens, device=device)


def _kept(weights: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """(ids ascending, weights) that survive top_k, top_p and min_p."""
    ids: Tensor | None = None
    if 0 < params.top_k < len(weights):
        ids = _largest(weights, params.top_k)
    if params.top_p < 1:
        ids = _smallest_set(weights, ids, params.top_p)
    ids = torch.arange(len(weights), device=weights.device) if ids is None else ids.sort().values
    kept = weights[ids]
    allowed = (kept >= params.min_p) & (kept > 0)
    return ids[allowed], kept[allowed]


def _largest(weights: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest, best first, ties to the lower id."""
    smallest = weights.topk(count).values[-1]
    ids = (weights >= smallest).nonzero().squeeze(1)
    return ids[weights[ids].sort(descending=True, stable=True).indices[:count]]


def _smallest_set(weights: Tensor, ids: Tensor | None, top_p: float) -> Tensor:
    """Ids, best first, of the most likely tokens until their share reaches `top_p`."""
    if ids is None:
        total, few = weights.sum(), min(_FEW, len(weights))
        ids = _largest(weights, few)
        if few < len(weights) and weights[ids].sum() < top_p * total:
            ids = _largest(weights, len(weights))
    else:
        total = weights[ids].sum()
    reached = weights[ids].cumsum(0) >= top_p * total
    count = int(reached.to(torch.uint8).argmax()) + 1 if bool(reached.any()) else len(ids)
    return ids[:count]


def top_of(logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(ids, values) of the `count` most likely in each row [S, vocabulary], best first, ties to the lower id."""
    if not count:
        return logprobs.new_empty((len(logprobs), 0), dtype=torch.int64), logprobs.new_empty((len(logprobs), 0))
    ids = torch.stack([_largest(row, count) for row in logprobs])
    return ids, logprobs.gather(1, ids)
