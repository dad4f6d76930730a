"""The toy's stage: sessions, checks and the way of a batch through the layers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from cake_core.errors import CakeError, CapacityError, RequestError, StageError
from cake_core.model import (
    SAMPLED,
    Batch,
    Memory,
    Pending,
    Row,
    SessionSpec,
    Tensor,
    float32_values,
    int32_values,
)
from cake_core.sampling import sample
from cake_core.testing.toy_answers import Answers, float32_rows
from cake_core.testing.toy_checkpoint import HIDDEN, VOCABULARY
from cake_core.testing.toy_layers import Head, Mixer, Norm, Vector


@dataclass(frozen=True, slots=True)
class ToySettings:
    """How a toy stage behaves; see `toy_text` for the options that set it."""

    context: int
    kv_tokens: int
    kv_block: int
    recurrent: bool = False
    seconds_per_position: float = 0.0
    seconds_per_batch: float = 0.0


@dataclass(frozen=True, slots=True)
class ToyWeights:
    """The layers of one stage; None where it does not hold one."""

    embedding: Sequence[Vector] | None
    mixers: Sequence[Mixer]
    norm: Norm | None
    head: Head | None

    @property
    def reads_tokens(self) -> bool:
        return self.embedding is not None or self.head is not None


@dataclass(slots=True)
class _Session:
    spec: SessionSpec
    length: int = 0
    states: list[list[Vector]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    sampled: int | None = None
    """What was drawn for the place right after `length`."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A checked row: its session, tokens (if the stage reads them), inputs (if it gets hidden states) and targets."""

    row: Row
    session: _Session
    tokens: list[int]
    inputs: list[Vector]
    targets: list[int]


class ToyStage:
    """Computes inside `submit`, so whatever is submitted is done when it returns."""

    def __init__(self, layers: tuple[str, ...], weights: ToyWeights, settings: ToySettings, nbytes: int) -> None:
        self.layers = layers
        self._weights = weights
        self._settings = settings
        self._nbytes = nbytes
        self._sessions: dict[int, _Session] = {}

    def open(self, session: int, spec: SessionSpec, parent: int | None = None, length: int = 0) -> int:
        if session in self._sessions:
            raise StageError(f"session {session} is open already; close it first")
        if spec.grammar is not None:
            raise RequestError("the toy model has no grammars; leave it out", "grammar")
        opened = _Session(spec, states=[[] for _ in self._weights.mixers])
        if parent is not None:
            if parent not in self._sessions:
                raise StageError(f"session {session} cannot begin as {parent}, which is not open; open it empty")
            origin = self._sessions[parent]
            kept = self._reachable(origin, min(length, self._room()))
            opened.length = kept
            opened.states = [states[:kept] for states in origin.states]
            opened.tokens = origin.tokens[:kept]
        self._sessions[session] = opened
        return opened.length

    def submit(self, batch: Batch) -> Pending:
        pending = Pending()
        try:
            steps = self._check(batch)
            time.sleep(self._settings.seconds_per_batch + self._settings.seconds_per_position * batch.positions)
            pending.set(self._run(batch, steps))
        except CakeError as error:
            pending.fail(error)
        return pending

    def truncate(self, session: int, length: int) -> int:
        if session not in self._sessions:
            raise StageError(f"session {session} is not open; open it first")
        kept = self._reachable(self._sessions[session], length)
        _cut(self._sessions[session], kept)
        return kept

    def close(self, session: int) -> None:
        self._sessions.pop(session, None)

    def memory(self) -> Memory:
        settings, mixers = self._settings, len(self._weights.mixers)
        if not mixers:
            return Memory("cpu", "f32", self._nbytes)
        return Memory("cpu", "f32", self._nbytes, settings.kv_tokens, self._room(), mixers * HIDDEN)

    def shutdown(self) -> None:
        self._sessions.clear()

    def _reachable(self, session: _Session, length: int) -> int:
        """The most positions of the first `length` that a session can go back to."""
        if length >= session.length:
            return session.length
        return 0 if self._settings.recurrent else max(length, 0)

    def _blocks(self, length: int) -> int:
        """Positions in whole KV blocks."""
        return -(-length // self._settings.kv_block) * self._settings.kv_block

    def _room(self) -> int:
        """Positions left in free blocks; a stage that keeps no states has room for anything."""
        if not self._weights.mixers:
            return self._settings.context
        return self._settings.kv_tokens - sum(self._blocks(session.length) for session in self._sessions.values())

    def _check(self, batch: Batch) -> list[_Step]:
        """Everything that could go wrong goes wrong here, before any session has changed."""
        tokens = int32_values(self._input(batch, "tokens")) if self._weights.reads_tokens else []
        hidden = [] if self._weights.embedding is not None else _vectors(self._input(batch, "hidden"))
        scoring = self._weights.head is not None and any(row.want.score for row in batch.rows)
        targets = int32_values(self._input(batch, "targets")) if scoring else []
        steps, start, needed = [], 0, 0
        for row in batch.rows:
            stop = start + row.length
            session = self._continued(row)
            given = self._known(row, session, tokens[start:stop])
            steps.append(_Step(row, session, given, hidden[start:stop], targets[start:stop]))
            needed += self._blocks(session.length + row.length) - self._blocks(session.length)
            start = stop
        if len({row.session for row in batch.rows}) < len(batch.rows):
            raise StageError("a batch has two rows of one session; send one after the other")
        if self._weights.mixers and needed > self._room():
            raise CapacityError(f"KV cache is full: {needed} positions asked, {self._room()} free; close a session first")
        return steps

    def _input(self, batch: Batch, name: str) -> Tensor:
        tensor = batch.tensors.get(name)
        if tensor is None or tensor.shape[:1] != (batch.positions,):
            raise StageError(f"a stage with {self.layers[0]} needs {name!r} with {batch.positions} positions")
        return tensor

    def _continued(self, row: Row) -> _Session:
        session = self._sessions.get(row.session)
        if session is None:
            raise StageError(f"session {row.session} is not open; open it first")
        if row.position != session.length or row.length < 1:
            raise StageError(f"session {row.session} is at position {session.length}, the row begins at {row.position}")
        if row.position + row.length > self._settings.context:
            raise StageError(f"session {row.session} would pass the context of {self._settings.context} positions")
        if not 0 <= row.want.sample <= row.length:
            raise StageError(f"session {row.session}: cannot sample {row.want.sample} of {row.length} positions")
        return session

    def _known(self, row: Row, session: _Session, tokens: list[int]) -> list[int]:
        """The row's tokens with SAMPLED replaced by what this stage drew."""
        if tokens and tokens[0] == SAMPLED and self._weights.embedding is not None and self._weights.head is not None:
            if session.sampled is None:
                raise StageError(f"session {row.session} has sampled no token for position {row.position}; send the token")
            tokens = [session.sampled, *tokens[1:]]
        for token in tokens:
            if not 0 <= token < VOCABULARY:
                raise StageError(f"session {row.session}: token {token} does not exist here")
        return tokens

    def _run(self, batch: Batch, steps: list[_Step]) -> Batch:
        answers, outputs = Answers(batch.rows), []
        for step in steps:
            session, embedding = step.session, self._weights.embedding
            vectors = step.inputs if embedding is None else [embedding[token] for token in step.tokens]
            for mixer, states in zip(self._weights.mixers, session.states, strict=True):
                vectors = mixer.run(vectors, states)
            if self._weights.norm is not None:
                vectors = [self._weights.norm.run(vector) for vector in vectors]
            session.length += step.row.length
            session.tokens += step.tokens
            session.sampled = None
            if self._weights.head is not None:
                self._answer(step, vectors, self._weights.head, answers)
            outputs += vectors
        if self._weights.head is None:
            return Batch(batch.rows, {"hidden": float32_rows(outputs, HIDDEN)})
        return Batch(batch.rows, answers.tensors())

    def _answer(self, step: _Step, vectors: list[Vector], head: Head, answers: Answers) -> None:
        want, session = step.row.want, step.session
        first_sampled = step.row.length - want.sample
        for index, vector in enumerate(vectors):
            logits = head.run(vector) if want.score or index >= first_sampled else []
            if index >= first_sampled:
                position = step.row.position + index + 1
                spec, history = session.spec, session.tokens[:position]
                token = sample(logits, spec.sampling, history, spec.prompt_length, position, spec.choice)
                answers.token(token, logits, want.top)
                session.sampled = token
            if want.score:
                answers.score(step.targets[index], logits, want.score_top)
            if want.hidden:
                answers.hidden(vector)


def _cut(session: _Session, length: int) -> None:
    if length < session.length:
        session.sampled = None
    session.length = length
    for states in session.states:
        del states[length:]
    del session.tokens[length:]


def _vectors(tensor: Tensor) -> list[Vector]:
    """The hidden states of a neighbour, which are whole numbers."""
    if tensor.shape[1:] != (HIDDEN,):
        raise StageError(f"hidden states are {list(tensor.shape)}, not [positions, {HIDDEN}]")
    values = float32_values(tensor)
    try:
        numbers = [int(value) for value in values]
    except (ValueError, OverflowError):
        numbers = []
    if numbers != values:
        raise StageError("hidden states are not what a toy layer gives out; a neighbour or the wire damaged them")
    return [tuple(numbers[start : start + HIDDEN]) for start in range(0, len(numbers), HIDDEN)]
