"""A small model on this node that writes ahead: what it draws is what the large one will probably draw.

It draws with the seed and at the positions of the request, so both models agree more often than their likeliest tokens
alone would, also at a temperature.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence as List
from dataclasses import dataclass, field, replace
from typing import cast

from cake_core.checkpoint import Checkpoint
from cake_core.engine.prefix import common_prefix
from cake_core.engine.sequence import Sequence
from cake_core.errors import CapacityError, ConfigError
from cake_core.model import NOTHING, SAMPLE, Batch, LoadOptions, Row, TextBackend, Tokenizer, int32_tensor, int32_values
from cake_core.plugins import Plugins
from cake_core.stages.devices import devices_of
from cake_core.stages.stage import LocalStage
from cake_core.topology import MASTER

CATCH_UP = 256
"""Positions of a long prompt that it reads at a time, so that nobody waits for it longer."""

_RATE = 0.2


@dataclass(slots=True)
class _Draft:
    session: int
    held: list[int] = field(default_factory=list)
    """The tokens that the stage has forwarded for it, wrong guesses included."""
    rewind: bool = False


class Drafter:
    """Drafts for sequences, each with a session of its own on `stage`. `seconds`: what one more guess of a batch costs."""

    def __init__(self, stage: LocalStage, vocab_size: int) -> None:
        self.seconds = 0.0
        self.stage = stage
        self._vocab_size = vocab_size
        self._drafts: dict[int, _Draft] = {}
        self._numbers = itertools.count(1)

    def draft(self, wanted: List[tuple[Sequence, int]]) -> list[list[int]]:
        """The next tokens of each sequence, as many as are wanted; none for one whose prompt is still being read, or when
        its cache is full."""
        found: list[list[int]] = [[] for _ in wanted]
        try:
            asked = [i for i, (sequence, _) in enumerate(wanted) if self._caught_up(sequence)]
            for step in range(max((wanted[i][1] for i in asked), default=0)):
                asked = [i for i in asked if step < wanted[i][1]]
                began = time.perf_counter()
                drawn = self._step([wanted[i][0] for i in asked], [found[i] for i in asked])
                if step:
                    self.seconds += _RATE * (time.perf_counter() - began - self.seconds)
                for i, token in zip(asked, drawn, strict=True):
                    found[i].append(token)
        except CapacityError:
            for sequence, _ in wanted:
                self.forget(sequence)
            return [[] for _ in wanted]
        return [list(itertools.takewhile(lambda token: token < self._vocab_size, tokens)) for tokens in found]

    def forget(self, sequence: Sequence) -> None:
        """Frees what is kept for it, if anything is."""
        draft = self._drafts.pop(sequence.order, None)
        if draft is not None:
            self.stage.close(draft.session)

    def _caught_up(self, sequence: Sequence) -> bool:
        """Reads on in its tokens; whether a single step reaches their end."""
        draft = self._drafts.get(sequence.order)
        if draft is None:
            draft = self._drafts[sequence.order] = _Draft(next(self._numbers))
            self.stage.open(draft.session, replace(sequence.spec(), grammar=None))
        same = min(common_prefix(draft.held, sequence.tokens), len(sequence.tokens) - 1)
        if same < len(draft.held):
            draft.rewind = True
            del draft.held[same:]
        if len(sequence.tokens) - same > CATCH_UP:
            self._forward([draft], [sequence.tokens[same : same + CATCH_UP]], sample=False)
        return len(sequence.tokens) - len(draft.held) <= CATCH_UP

    def _step(self, sequences: List[Sequence], guessed: List[List[int]]) -> list[int]:
        drafts = [self._drafts[sequence.order] for sequence in sequences]
        known = [g[-1:] or s.tokens[len(d.held) :] for s, d, g in zip(sequences, drafts, guessed, strict=True)]
        return self._forward(drafts, known, sample=True)

    def _forward(self, drafts: List[_Draft], tokens: List[List[int]], sample: bool) -> list[int]:
        want = SAMPLE if sample else NOTHING
        rows = tuple(Row(d.session, len(d.held), len(t), want, d.rewind) for d, t in zip(drafts, tokens, strict=True))
        flat = int32_tensor([token for row in tokens for token in row])
        result = self.stage.submit(Batch(rows, {"tokens": flat})).result()
        for draft, row in zip(drafts, tokens, strict=True):
            draft.held += row
            draft.rewind = False
        return int32_values(result.tensors["tokens"]) if sample else []


def load_drafter(plugins: Plugins, checkpoint: Checkpoint, options: LoadOptions, model: Tokenizer) -> Drafter:
    """All of a draft model on this node, for a model with this tokenizer. Raises ConfigError when they do not fit."""
    backend = cast("TextBackend", plugins.backend_for(checkpoint, "text"))
    tokenizer = backend.tokenizer(checkpoint)
    check_same_tokens(tokenizer, model)
    options = replace(options, device=devices_of(options)[0], kv_tokens=None, context=None)
    info = backend.describe(checkpoint, options)
    stage = backend.load(checkpoint, info, [layer.name for layer in info.layers], options)
    return Drafter(LocalStage(MASTER, stage), min(info.vocab_size, model.vocab_size))


def check_same_tokens(draft: Tokenizer, model: Tokenizer) -> None:
    """Raises ConfigError unless both models mean the same by an id."""
    size = min(draft.vocab_size, model.vocab_size)
    # A stride that meets every part of a vocabulary; all of it would take seconds.
    seen = [*range(min(size, 256)), *range(256, size, 101)]
    if any(draft.token_bytes(token) != model.token_bytes(token) for token in seen):
        raise ConfigError("the model of --draft has another vocabulary; name one of the same family, e.g. its smallest size")
