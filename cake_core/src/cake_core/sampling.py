"""The reference sampler: how a token is drawn from logits, in plain Python, as a pure function.

Every backend draws like this one, so a request gives the same text on any placement and any backend; the contract kit
compares them. A backend that draws on a device reproduces these definitions exactly:

- *Uniform*: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with
  key = (low 32 bits of the seed, high 32 bits of the seed) and
  counter = (low 32 bits of the position, high ones, low 32 bits of the choice, high ones).
  Of its output words w0 .. w3 the draw is u = ((w0 << 32 | w1) >> 11) * 2**-53, a float64 in [0, 1).
- *Position*: the place the drawn token takes in its sequence, counted from 0: the first token after a prompt of n tokens
  has position n. A token drawn again after `truncate` is therefore the same token.
- *Order*: `banned_until`, `logit_bias`, repeat penalty, frequency and presence penalty, temperature, top_k, top_p, min_p,
  one draw. Everything in float64.
- *Ties* go to the lower id, in `argmax`, `top_k` and `top_p`.
- *Draw*: over the kept tokens in ascending order of id with weights exp((logit - largest logit) / temperature), the first
  whose cumulative sum exceeds u times the whole sum.

Log-probabilities that are reported are those of the model itself: the natural log-softmax of the raw logits, before any of
the above (as OpenAI and vLLM report them).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from heapq import nsmallest
from itertools import accumulate

from cake_core.errors import RequestError, StageError
from cake_core.requests import SamplingParams

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """One block of Philox4x32-10: four 32-bit words from a 128-bit counter and a 64-bit key, least significant word first."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def uniform(seed: int, choice: int, position: int) -> float:
    """The draw in [0, 1), 53 bits of it, for one position of one choice; see the module's text for the exact mapping."""
    counter = (position & _WORD, position >> 32 & _WORD, choice & _WORD, choice >> 32 & _WORD)
    w0, w1, _, _ = philox4x32(counter, (seed & _WORD, seed >> 32 & _WORD))
    return ((w0 << 32 | w1) >> 11) * 2.0**-53


def log_softmax(logits: Sequence[float]) -> list[float]:
    """Natural log-probabilities of raw logits: what is reported as log-probabilities."""
    best = _best(logits)
    shift = best + math.log(math.fsum(math.exp(x - best) for x in logits))
    return [x - shift for x in logits]


def top_logprobs(logprobs: Sequence[float], count: int) -> list[tuple[int, float]]:
    """The `count` most likely (id, log-probability), best first, ties to the lower id."""
    return nsmallest(count, enumerate(logprobs), key=lambda pair: (-pair[1], pair[0]))


def argmax(logits: Sequence[float]) -> int:
    """The most likely id, the lowest of equals."""
    return logits.index(_best(logits))


def sample(
    logits: Sequence[float], params: SamplingParams, history: Sequence[int], prompt_length: int, position: int, choice: int
) -> int:
    """Draws one token.

    Args:
        logits: the model's raw logits, one an id.
        history: every token so far, prompt and answer.
        prompt_length: how many of `history` are the prompt.
        position: the place the token will have, which is `len(history)`.
        choice: index among the choices of one request.

    Raises:
        RequestError: `logit_bias` or `banned_until` names an id the model does not have.
        StageError: the logits hold NaN, or every token is ruled out.
    """
    kept = process(logits, params, history, prompt_length)
    if len(kept) == 1:
        return kept[0][0]
    sums = list(accumulate(weight for _, weight in kept))
    threshold = uniform(params.seed, choice, position) * sums[-1]
    return next(token for (token, _), reached in zip(kept, sums, strict=True) if reached > threshold)


def process(
    logits: Sequence[float], params: SamplingParams, history: Sequence[int], prompt_length: int
) -> list[tuple[int, float]]:
    """The tokens that may be drawn and their probabilities up to a common factor, in ascending order of id.

    With temperature 0 that is the most likely token alone.
    """
    scores = penalise(logits, params, history, prompt_length)
    best = _best(scores)
    if params.temperature == 0:
        return [(scores.index(best), 1.0)]
    kept = [(token, math.exp((x - best) / params.temperature)) for token, x in enumerate(scores) if x > -math.inf]
    if 0 < params.top_k < len(kept):
        kept = nsmallest(params.top_k, kept, key=_rank)
    if params.top_p < 1:
        kept = _smallest_set(kept, params.top_p)
    # The most likely token weighs exactly 1, so min_p compares with it as it is.
    return sorted(pair for pair in kept if pair[1] >= params.min_p and pair[1] > 0)


def penalise(logits: Sequence[float], params: SamplingParams, history: Sequence[int], prompt_length: int) -> list[float]:
    """Logits after bans, bias and penalties: the first half of `process`."""
    scores = list(logits)
    if len(history) - prompt_length < params.min_tokens:
        for token in params.banned_until:
            scores[_known(token, scores, "banned_until")] = -math.inf
    for token, value in params.logit_bias:
        scores[_known(token, scores, "logit_bias")] += value
    if params.repeat_penalty != 1 and params.repeat_last_n:
        recent = history if params.repeat_last_n < 0 else history[-params.repeat_last_n :]
        for token in set(recent):
            score = scores[token]
            scores[token] = score / params.repeat_penalty if score > 0 else score * params.repeat_penalty
    if params.frequency_penalty or params.presence_penalty:
        for token, count in Counter(history[prompt_length:]).items():
            scores[token] -= count * params.frequency_penalty + params.presence_penalty
    return scores


def _smallest_set(kept: list[tuple[int, float]], top_p: float) -> list[tuple[int, float]]:
    """The most likely tokens until their share of what is kept reaches `top_p`; never none."""
    ranked = sorted(kept, key=_rank)
    limit = top_p * math.fsum(weight for _, weight in ranked)
    count = next((i for i, reached in enumerate(accumulate(weight for _, weight in ranked), 1) if reached >= limit), None)
    return ranked[:count]


def _rank(pair: tuple[int, float]) -> tuple[float, int]:
    return -pair[1], pair[0]


def _best(logits: Sequence[float]) -> float:
    best = max(logits)
    if math.isnan(sum(logits)) or math.isinf(best):
        raise StageError("the model's logits are not numbers, or every token is ruled out; try another dtype or fewer bans")
    return best


def _known(token: int, scores: Sequence[float], name: str) -> int:
    if not 0 <= token < len(scores):
        raise RequestError(f"{name} names token {token}, but the model's ids end at {len(scores) - 1}", name)
    return token
