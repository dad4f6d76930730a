"""What a batch gave, row by row: drawn tokens, log-probabilities, scores, hidden states. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass, replace
from itertools import zip_longest

from cake_core.engine.sequence import Sequence
from cake_core.errors import ProtocolError
from cake_core.events import Embedding, TokenLogprob
from cake_core.model import Batch, Row, Tensor, float32_values, int32_values


@dataclass(frozen=True, slots=True)
class RowResult:
    """One row's share of the results."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob | None, ...] = ()
    scores: tuple[TokenLogprob | None, ...] = ()
    hidden: Tensor | None = None

    def apply(self, sequence: Sequence) -> None:
        """Appends to the sequence what it asked for, in order of positions."""
        for score in self.scores:
            if score is not None:  # scores[i] is of token i of the prompt; the first has none
                sequence.scores.append(replace(score, token=sequence.tokens[len(sequence.scores)]))
        if self.hidden is not None:
            self._collect_hidden(sequence, self.hidden)
        before = len(sequence.tokens)
        sequence.count_guesses(proposed=len(sequence.guesses))
        # A draw is good as long as everything before it is part of the text: up to the first guess that was wrong.
        for token, logprob, guess in zip_longest(self.tokens, self.logprobs, sequence.guesses):
            if sequence.ended:
                break
            if sequence.generated == 0:
                sequence.prompt_done()
            sequence.accept(token, logprob)
            if token != guess:
                break
            sequence.count_guesses(accepted=1)
        if self.tokens:
            sequence.settle(before)

    def _collect_hidden(self, sequence: Sequence, hidden: Tensor) -> None:
        sequence.hidden.append(bytes(hidden.data))
        if sequence.remaining == 0 and not sequence.in_flight:
            sequence.events.append(Embedding(hidden.shape[1], b"".join(sequence.hidden)))


def apply_results(rows: List[Row], batch: Batch) -> Iterator[tuple[int, RowResult]]:
    """(index of the row, its result) for every row. Raises ProtocolError when the tensors do not fit the rows."""
    samples, scores, hidden = _Samples(batch), _Scores(batch), _Hidden(batch)
    for index, row in enumerate(rows):
        want = row.want
        tokens, logprobs = samples.take(want.sample, want.top)
        yield (
            index,
            RowResult(
                tokens,
                logprobs,
                scores.take(row.length, want.score_top) if want.score else (),
                hidden.take(row.length) if want.hidden else None,
            ),
        )
    samples.check_empty()


class _Samples:
    def __init__(self, batch: Batch) -> None:
        tensors = batch.tensors
        self._tokens = int32_values(tensors["tokens"]) if "tokens" in tensors else []
        self._logprobs = float32_values(tensors["logprobs"]) if "logprobs" in tensors else []
        self._tops = _tops(tensors.get("top_ids"), tensors.get("top_logprobs"))
        self._at = 0

    def take(self, count: int, top: int) -> tuple[tuple[int, ...], tuple[TokenLogprob | None, ...]]:
        start, self._at = self._at, self._at + count
        tokens = tuple(self._tokens[start : self._at])
        if len(tokens) < count:
            raise ProtocolError(f"{count} tokens were asked of a row, {len(tokens)} came")
        if top < 0:
            return tokens, (None,) * count
        found = []
        for i, token in enumerate(tokens, start):
            best = self._tops[i][:top] if self._tops else ()
            found.append(TokenLogprob(token, self._logprobs[i], tuple(best)))
        return tokens, tuple(found)

    def check_empty(self) -> None:
        if self._at != len(self._tokens):
            raise ProtocolError(f"{len(self._tokens)} tokens came, {self._at} were asked for")


class _Scores:
    def __init__(self, batch: Batch) -> None:
        tensors = batch.tensors
        self._values = float32_values(tensors["score_logprobs"]) if "score_logprobs" in tensors else []
        self._tops = _tops(tensors.get("score_top_ids"), tensors.get("score_top_logprobs"))
        self._at = 0

    def take(self, length: int, top: int) -> tuple[TokenLogprob | None, ...]:
        start, self._at = self._at, self._at + length
        values = self._values[start : self._at]
        if len(values) < length:
            raise ProtocolError(f"{length} scores were asked of a row, {len(values)} came")
        return tuple(
            None if math.isnan(value) else TokenLogprob(-1, value, tuple(self._tops[i][:top]) if self._tops else ())
            for i, value in enumerate(values, start)
        )


class _Hidden:
    def __init__(self, batch: Batch) -> None:
        self._tensor = batch.tensors.get("final")
        self._at = 0

    def take(self, length: int) -> Tensor:
        tensor = self._tensor
        if tensor is None or tensor.shape[0] < self._at + length:
            raise ProtocolError("the final hidden states that were asked for did not come")
        width = tensor.shape[1]
        view = memoryview(tensor.data).cast("B")[self._at * width * 4 : (self._at + length) * width * 4]
        self._at += length
        return Tensor("f32", (length, width), view)


def _tops(ids: Tensor | None, logprobs: Tensor | None) -> list[tuple[tuple[int, float], ...]]:
    """Alternatives by position, padding left out."""
    if ids is None or logprobs is None or not ids.shape[-1]:
        return []
    width = ids.shape[-1]
    flat_ids, flat = int32_values(ids), float32_values(logprobs)
    return [
        tuple((t, p) for t, p in zip(flat_ids[i : i + width], flat[i : i + width], strict=True) if t >= 0)
        for i in range(0, len(flat_ids), width)
    ]
