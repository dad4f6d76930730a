"""Who guesses for a batch: the text itself, or a draft model on this node where the text knows nothing."""

from __future__ import annotations

from collections.abc import Sequence as List

from cake_core.engine.drafter import Drafter
from cake_core.engine.sequence import Sequence
from cake_core.engine.speculation import Crowd, Guessing, Pace, Speculation, Tally, best_length

_ASK_AGAIN = 32
"""Tokens after which a draft model that was not worth its time is asked once more."""


class Speculator:
    """`drafter`: a draft model, if there is one. `off` once a stage has turned out to be unable to go back."""

    def __init__(self, speculation: Speculation, drafter: Drafter | None = None) -> None:
        self.speculation = speculation
        self.pace = Pace()
        self.tally = Tally()
        self.off = False
        self.drafter = drafter

    def guess(self, sequences: List[Sequence]) -> list[list[int]]:
        """Guesses for the next row of each, as many as are worth their time in one batch of them all."""
        lengths, positions = [0] * len(sequences), len(sequences)
        to_draft: list[tuple[int, Sequence, int]] = []
        for index, sequence in enumerate(sequences):
            most = min(self.speculation.most, sequence.room)
            if self.off or most < 1 or not sequence.may_be_guessed:
                continue
            guessing = sequence.guessing = sequence.guessing or Guessing(self.tally)
            guessing.look_up(sequence.tokens, most)
            crowd = Crowd(len(sequences) - 1, positions - 1)
            if self._drafts(guessing):
                wanted = self._draft_length(sequence, guessing, most, crowd)
                if wanted:
                    to_draft.append((index, sequence, wanted))
            elif guessing.guesses:
                right = guessing.trust.of(guessing.agreeing)
                lengths[index] = best_length(right, len(guessing.guesses), crowd, self.pace.seconds)
            positions += lengths[index]
        self._draft(to_draft, lengths)
        return [s.guessing.guesses[:n] if s.guessing else [] for s, n in zip(sequences, lengths, strict=True)]

    def observe(self, positions: int, seconds: float) -> None:
        """A step of so many positions took so long, without the wait for steps before it."""
        self.pace.observe(positions, seconds)

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        if self.drafter is not None:
            self.drafter.forget(sequence)

    def _drafts(self, guessing: Guessing) -> bool:
        """Whether the draft model is to be asked: it is there, and more likely to be right than the text."""
        if self.drafter is None:
            return False
        return not guessing.guesses or guessing.trust.of(guessing.agreeing) < guessing.trust.of(0)

    def _draft_length(self, sequence: Sequence, guessing: Guessing, most: int, crowd: Crowd) -> int:
        each = 0.0 if self.drafter is None else self.drafter.seconds
        length = best_length(guessing.trust.of(0), most, crowd, self.pace.seconds, each)
        if not length and len(sequence.tokens) - guessing.drafted_at >= _ASK_AGAIN:
            length = 1
        if length:
            guessing.drafted_at = len(sequence.tokens)
        return length

    def _draft(self, to_draft: List[tuple[int, Sequence, int]], lengths: list[int]) -> None:
        if self.drafter is None or not to_draft:
            return
        drafts = self.drafter.draft([(sequence, wanted) for _, sequence, wanted in to_draft])
        for (index, sequence, _), draft in zip(to_draft, drafts, strict=True):
            if draft and sequence.guessing is not None:
                sequence.guessing.guesses, sequence.guessing.agreeing = draft, 0
                lengths[index] = len(draft)
