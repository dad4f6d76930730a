"""Sessions of the fading model: a state a layer, which cannot go back, so `truncate` and `open` keep all or nothing."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cake_core.errors import CakeError, StageError
from cake_core.model import SAMPLED, Batch, Memory, Pending, Row, SessionSpec, float32_values, int32_values
from cake_core.sampling import sample
from cake_core.testing.toy_answers import Answers, float32_rows


@dataclass(slots=True)
class Session:
    spec: SessionSpec
    length: int = 0
    states: dict[str, list[float]] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    drawn: int = -1


class MarkovStage:
    def __init__(self, weights: Mapping[str, list[list[float]]]) -> None:
        self.layers = tuple(weights)
        self._weights = weights
        self._width = len(next(iter(weights.values()))[0])
        self._sessions: dict[int, Session] = {}

    def open(self, session: int, spec: SessionSpec, parent: int | None = None, length: int = 0) -> int:
        if session in self._sessions or (parent is not None and parent not in self._sessions):
            raise StageError(f"session {session} is open already, or its parent {parent} is not")
        self._sessions[session] = Session(spec)
        return 0

    def submit(self, batch: Batch) -> Pending:
        pending = Pending()
        try:
            for row in batch.rows:
                self._check(row)
            answers = Answers(batch.rows)
            outputs = [vector for part in batch.split() for vector in self._run(part, answers)]
            tensors = answers.tensors() if "lm_head" in self._weights else {"hidden": float32_rows(outputs, self._width)}
            pending.set(Batch(batch.rows, tensors))
        except CakeError as error:
            pending.fail(error)
        return pending

    def truncate(self, session: int, length: int) -> int:
        kept = self._sessions[session]
        if length < kept.length:
            self._sessions[session] = kept = Session(kept.spec)
        return kept.length

    def close(self, session: int) -> None:
        self._sessions.pop(session, None)

    def memory(self) -> Memory:
        return Memory("cpu", "f32", sum(4 * self._width * len(rows) for rows in self._weights.values()))

    def shutdown(self) -> None:
        self._sessions.clear()

    def _check(self, row: Row) -> None:
        session = self._sessions.get(row.session)
        if session is None or session.length != row.position:
            raise StageError(f"session {row.session} does not continue at {row.position}")

    def _run(self, batch: Batch, answers: Answers) -> list[list[float]]:
        (row,) = batch.rows
        session, tokens = (
            self._sessions[row.session],
            int32_values(batch.tensors["tokens"]) if "tokens" in batch.tensors else [],
        )
        if tokens[:1] == [SAMPLED]:
            tokens[0] = session.drawn
        if "hidden" in batch.tensors:
            flat = float32_values(batch.tensors["hidden"])
            vectors = [flat[start : start + self._width] for start in range(0, len(flat), self._width)]
        else:
            vectors = [self._weights["model.embed_tokens"][token] for token in tokens]
        targets = int32_values(batch.tensors["targets"]) if "targets" in batch.tensors else [-1] * row.length
        for index, vector in enumerate(vectors):
            vectors[index] = vector = self._position(session, vector)
            session.length += 1
            session.tokens += tokens[index : index + 1]
            if "lm_head" in self._weights:
                self._answer(row, session, vector, answers, (index, targets[index]))
        return vectors

    def _position(self, session: Session, vector: list[float]) -> list[float]:
        for name, (weight, *_) in self._weights.items():
            if name.startswith("model.layers."):
                state = session.states.get(name, [0.0] * self._width)
                session.states[name] = state = [d * s + v for d, s, v in zip(weight, state, vector, strict=True)]
                vector = [math.tanh(s) for s in state]
            elif name == "model.norm":
                vector = [w * v for w, v in zip(weight, vector, strict=True)]
            # As f32 at every edge, so that a cut there changes nothing.
            vector = array("f", vector).tolist()
        return vector

    def _answer(self, row: Row, session: Session, vector: Sequence[float], answers: Answers, at: tuple[int, int]) -> None:
        index, target = at
        want, spec = row.want, session.spec
        logits = [sum(w * v for w, v in zip(weight, vector, strict=True)) for weight in self._weights["lm_head"]]
        if index >= row.length - want.sample:
            arguments = spec.prompt_length, session.length, spec.choice
            session.drawn = sample(logits, spec.sampling, session.tokens, *arguments)
            answers.token(session.drawn, logits, want.top)
        if want.score:
            answers.score(target, logits, want.score_top)
        if want.hidden:
            answers.hidden(vector)
