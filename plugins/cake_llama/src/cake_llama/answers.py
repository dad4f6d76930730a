"""What the stage with `lm_head` gives back: drawn tokens, log-probabilities, scores of given ids, final hidden states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from cake_core import model as core
from cake_core.model import Row
from cake_llama.grammar import Grammar
from cake_llama.model import Project
from cake_llama.sampling import draw, top_of
from cake_llama.wire import to_wire

_SLICE = 64
"""Positions whose logits exist at a time while scoring."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One row and what its session knows: the history up to and including the row's tokens, the spec, the targets."""

    row: Row
    start: int
    history: Sequence[int]
    spec: core.SessionSpec
    targets: Sequence[int]
    grammar: Grammar | None = None


@dataclass(slots=True)
class Answers:
    """Collects the answers of a batch, row by row, in the layout of `cake_core.model.Batch`."""

    head: Project
    tokens: list[int] = field(default_factory=list)
    _logprobs: list[Tensor | None] = field(default_factory=list)
    """Of each token; None where it was not asked for, as in `_tops`."""
    _tops: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)
    _scores: list[Tensor] = field(default_factory=list)
    _score_tops: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _final: list[Tensor] = field(default_factory=list)

    def collect(self, hidden: Tensor, asked: Sequence[Asked]) -> list[list[int]]:
        """Computes everything asked of `hidden` [T, hidden_size]; returns the drawn tokens of each row."""
        drawn: list[list[int]] = [[] for _ in asked]
        places = [(i, r.start + r.row.length - k) for i, r in enumerate(asked) for k in range(r.row.want.sample, 0, -1)]
        if places:
            logits = self.head(hidden[[at for _, at in places]]).to(torch.float32)
            for (index, at), row in zip(places, logits, strict=True):
                drawn[index].append(self._sample(row, asked[index], at))
        for one in asked:
            own = hidden[one.start : one.start + one.row.length]
            if one.row.want.score:
                self._score(own, one)
            if one.row.want.hidden:
                self._final.append(own.to(torch.float32))
        return drawn

    def _sample(self, logits: Tensor, asked: Asked, at: int) -> int:
        known = asked.history[: len(asked.history) - (asked.start + asked.row.length - 1 - at)]
        spec = asked.spec
        allowed = logits if asked.grammar is None else asked.grammar.allow(logits, known[spec.prompt_length :])
        token = draw(allowed, spec.sampling, known, spec.prompt_length, spec.choice)
        self.tokens.append(token)
        if asked.row.want.top >= 0:
            logprobs = logits.log_softmax(-1)
            self._logprobs.append(logprobs[token])
            self._tops.append(top_of(logprobs[None], asked.row.want.top))
        else:
            self._logprobs.append(None)
            self._tops.append(None)
        return token

    def _score(self, hidden: Tensor, asked: Asked) -> None:
        targets = torch.tensor(asked.targets, device=hidden.device)
        for start in range(0, len(hidden), _SLICE):
            logprobs = self.head(hidden[start : start + _SLICE]).to(torch.float32).log_softmax(-1)
            wanted = targets[start : start + _SLICE]
            found = logprobs.gather(1, wanted.clamp(min=0)[:, None])[:, 0]
            self._scores.append(torch.where(wanted < 0, math.nan, found))
            self._score_tops.append(top_of(logprobs, asked.row.want.score_top))

    def tensors(self) -> Mapping[str, core.Tensor]:
        found = {"tokens": core.int32_tensor(self.tokens)}
        known = next((value for value in self._logprobs if value is not None), None)
        if known is not None:
            unknown = known.new_tensor(math.nan)
            found["logprobs"] = to_wire(torch.stack([unknown if value is None else value for value in self._logprobs]))
            none = top_of(known[None, None], 0)
            found |= _tops("top", [none if top is None else top for top in self._tops])
        if self._scores:
            found["score_logprobs"] = to_wire(torch.cat(self._scores))
            found |= _tops("score_top", self._score_tops)
        if self._final:
            found["final"] = to_wire(torch.cat(self._final))
        return found


def _tops(name: str, tops: Sequence[tuple[Tensor, Tensor]]) -> Mapping[str, core.Tensor]:
    """Alternatives of all positions in one rectangle, padded with -1 and -inf."""
    width = max(ids.shape[1] for ids, _ in tops)
    ids = torch.cat([pad(i, (0, width - i.shape[1]), value=-1) for i, _ in tops]).to(torch.int32)
    logprobs = torch.cat([pad(p, (0, width - p.shape[1]), value=-math.inf) for _, p in tops])
    return {f"{name}_ids": to_wire(ids), f"{name}_logprobs": to_wire(logprobs)}
