"""Collects what the rows of a batch asked for (`Want`) and lays it out as `Batch` says."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from itertools import chain

from cake_core.model import Row, Tensor, int32_tensor
from cake_core.sampling import log_softmax, top_logprobs

_Ranked = list[tuple[int, float]]


class Answers:
    """Filled a position at a time, in the order of the batch."""

    def __init__(self, rows: Sequence[Row]) -> None:
        wants = [row.want for row in rows]
        self._sampling = any(want.sample for want in wants)
        self._logprobs = any(want.sample and want.top >= 0 for want in wants)
        self._scoring = any(want.score for want in wants)
        self._hidden = any(want.hidden for want in wants)
        self._top = max((want.top for want in wants if want.sample), default=0)
        self._score_top = max((want.score_top for want in wants if want.score), default=0)
        self._tokens: list[int] = []
        self._token_logprobs: list[float] = []
        self._tops: list[_Ranked] = []
        self._scores: list[float] = []
        self._score_tops: list[_Ranked] = []
        self._final: list[Sequence[float]] = []

    def token(self, token: int, logits: Sequence[float], top: int) -> None:
        """A drawn token with its `top` alternatives; -1 for no log-probabilities."""
        self._tokens.append(token)
        logprobs = log_softmax(logits) if top >= 0 else []
        self._token_logprobs.append(logprobs[token] if logprobs else math.nan)
        self._tops.append(top_logprobs(logprobs, max(top, 0)))

    def score(self, target: int, logits: Sequence[float], top: int) -> None:
        """A position to score: `target` is the id asked for, -1 for none."""
        logprobs = log_softmax(logits)
        self._scores.append(math.nan if target < 0 else logprobs[target])
        self._score_tops.append(top_logprobs(logprobs, top))

    def hidden(self, values: Sequence[float]) -> None:
        self._final.append(values)

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if self._sampling:
            found["tokens"] = int32_tensor(self._tokens)
        if self._logprobs:
            found["logprobs"] = float32_tensor(self._token_logprobs)
            found["top_ids"], found["top_logprobs"] = _ranked(self._tops, self._top)
        if self._scoring:
            found["score_logprobs"] = float32_tensor(self._scores)
            found["score_top_ids"], found["score_top_logprobs"] = _ranked(self._score_tops, self._score_top)
        if self._hidden:
            found["final"] = float32_rows(self._final, len(self._final[0]))
        return found


def float32_tensor(values: Sequence[float]) -> Tensor:
    return Tensor("f32", (len(values),), array("f", values).tobytes())


def float32_rows(rows: Sequence[Sequence[float]], width: int) -> Tensor:
    return Tensor("f32", (len(rows), width), array("f", chain.from_iterable(rows)).tobytes())


def _ranked(rows: Sequence[_Ranked], width: int) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities as [rows, width]; places nobody asked for hold -1 and -inf."""
    padded = [row + [(-1, -math.inf)] * (width - len(row)) for row in rows]
    ids = array("i", (token for row in padded for token, _ in row))
    return Tensor("i32", (len(rows), width), ids.tobytes()), float32_rows([[x for _, x in row] for row in padded], width)
