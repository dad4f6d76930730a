"""A batch to be, and what its rows ask for. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from cake_core.engine.sequence import Sequence
from cake_core.model import Row, Want


@dataclass(slots=True)
class Step:
    """A batch to be: `rows[i]` belongs to `sequences[i]`. `launched`: when, by the engine's clock. `reads`: it holds a part of
    a prompt. `decodes`: it holds rows of sequences whose prompts are through."""

    sequences: list[Sequence] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    launched: float = 0.0
    reads: bool = False
    decodes: bool = False

    @property
    def positions(self) -> int:
        return sum(row.length for row in self.rows)

    def add(self, sequence: Sequence, length: int, want: Want) -> None:
        assert sequence.session is not None  # noqa: S101 - admitted sequences have one
        self.sequences.append(sequence)
        self.rows.append(Row(sequence.session, sequence.forwarded, length, want, sequence.rewind))
        sequence.rewind = False
        sequence.forwarded += length
        sequence.in_flight += 1
        sequence.drawing += want.sample


def decode_want(sequence: Sequence, length: int) -> Want:
    top = sequence.request.logprobs
    return Want(sample=length, top=-1 if top is None else top)


def prefill_want(sequence: Sequence, length: int) -> Want:
    """What a prompt chunk asks for: a draw after the last position, scores where they were not asked for before."""
    request = sequence.request
    if request.embed:
        return Want(hidden=True)
    top = -1 if request.logprobs is None else request.logprobs
    last = length == sequence.remaining
    score = request.score_prompt and sequence.scored == sequence.forwarded < sequence.prompt_length
    if score:
        sequence.scored += length
    sample = 1 if last and sequence.generates else 0
    return Want(sample, top if sample else -1, score, max(0, top) if score else 0)
