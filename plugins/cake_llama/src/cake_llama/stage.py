"""A stage of the Llama family: sessions, checks, and the way of a batch through the layers. Computes inside `submit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from cake_core.errors import CakeError, CapacityError, StageError
from cake_core.model import SAMPLED, Batch, Memory, Pending, Row, SessionSpec, int32_values
from cake_llama.answers import Answers, Asked
from cake_llama.attention import RowPlan, StepPlan
from cake_llama.cache import BLOCK, KvCache, Table
from cake_llama.config import ModelConfig
from cake_llama.grammar import Grammar, Grammars
from cake_llama.memory import current
from cake_llama.model import Dtypes, Parts
from cake_llama.rotary import Rotary, Span
from cake_llama.wire import FROM_TORCH, SCALED, TO_TORCH, hidden_from_wire, hidden_to_wire


@dataclass(slots=True)
class Session:
    """What a stage keeps of one session."""

    spec: SessionSpec
    table: Table = field(default_factory=Table)
    tokens: list[int] = field(default_factory=list)
    """Ids at the positions in the cache, where this stage reads tokens."""
    sampled: int | None = None
    """What was drawn for the place right after them."""
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A checked row."""

    row: Row
    session: Session
    start: int
    tokens: Sequence[int]
    targets: Sequence[int]


@dataclass(frozen=True, slots=True)
class StageSpec:
    """What a stage is: `weights` are its bytes, `context` the most positions a session may have, `grammars` compiles those
    of its sessions where it holds `lm_head`."""

    config: ModelConfig
    layers: tuple[str, ...]
    dtypes: Dtypes
    context: int
    weights: int
    grammars: Grammars


class LlamaStage:
    """One object for the layers a node holds."""

    def __init__(self, spec: StageSpec, parts: Parts, cache: KvCache, rotary: Rotary) -> None:
        self.layers = spec.layers
        self._spec = spec
        self._config = spec.config
        self._parts = parts
        self._cache = cache
        self._rotary = rotary
        self._sessions: dict[int, Session] = {}
        self._reads_tokens = parts.embedding is not None or parts.head is not None
        self._device = rotary.device
        self._dtype = spec.dtypes.computed

    # Sessions

    def open(self, session: int, spec: SessionSpec, parent: int | None = None, length: int = 0) -> int:
        if session in self._sessions:
            raise StageError(f"session {session} is open already; close it first")
        if spec.wire_dtype and spec.wire_dtype not in TO_TORCH:
            raise StageError(f"hidden states cannot be sent as {spec.wire_dtype!r}")
        opened = Session(spec)
        if spec.grammar is not None and self._parts.head is not None:
            opened.grammar = self._spec.grammars.compile(spec.grammar)
        if parent is not None:
            origin = self._find(parent)
            kept = self._shareable(origin, spec, min(length, origin.table.length))
            opened.table = self._cache.fork(origin.table, kept)
            opened.tokens = origin.tokens[:kept]
        self._sessions[session] = opened
        return opened.table.length

    def truncate(self, session: int, length: int) -> int:
        found = self._find(session)
        kept = max(0, min(length, found.table.length))
        self._go_back(found, kept)
        return kept

    def close(self, session: int) -> None:
        found = self._sessions.pop(session, None)
        if found is not None:
            self._cache.truncate(found.table, 0)

    def memory(self) -> Memory:
        cache = self._cache
        return Memory(
            device=str(self._device),
            dtype=FROM_TORCH[self._spec.dtypes.stored],
            weights=self._spec.weights,
            kv_tokens=cache.blocks * BLOCK if cache.keys else 0,
            kv_tokens_free=cache.free_blocks * BLOCK if cache.keys else 0,
            kv_bytes_per_token=cache.bytes_per_token,
        )

    def shutdown(self) -> None:
        self._sessions.clear()
        self._parts = Parts(None, (), None, None)
        self._cache = KvCache(0, (0, 0), 0, self._device, torch.float32)

    def _find(self, session: int) -> Session:
        found = self._sessions.get(session)
        if found is None:
            raise StageError(f"session {session} is not open; open it first")
        return found

    def _shareable(self, origin: Session, spec: SessionSpec, length: int) -> int:
        """Positions of `origin` that are the same in a session of `spec`: none where angles depend on the prompt's length."""
        rope = self._config.rope
        if rope.depends_on_length and spec.prompt_length != origin.spec.prompt_length:
            if max(spec.prompt_length, origin.spec.prompt_length) > rope.original_length:
                return 0
            return min(length, rope.original_length)
        return length

    # Batches

    def submit(self, batch: Batch) -> Pending:
        pending = Pending()
        try:
            with torch.inference_mode(), current(self._device):
                steps = self._check(batch)
                try:
                    pending.set(self._run(batch, steps))
                except BaseException:
                    # Nothing of a batch that failed may stay, or the next one would not continue where the caller stands.
                    for step in steps:
                        self._go_back(step.session, step.row.position)
                    raise
        except CakeError as error:
            pending.fail(error)
        except torch.OutOfMemoryError as error:
            pending.fail(CapacityError(f"{self._device} ran out of memory: {error}; use fewer requests or less context"))
        return pending

    def _go_back(self, session: Session, length: int) -> None:
        if length < session.table.length:
            session.sampled = None
        self._cache.truncate(session.table, length)
        del session.tokens[length:]

    def _check(self, batch: Batch) -> list[Step]:
        """Everything that can be wrong with a batch, before anything is changed."""
        total = batch.positions
        tokens = self._ids(batch, "tokens", total) if self._reads_tokens else [0] * total
        scores = any(row.want.score for row in batch.rows) and self._parts.head is not None
        targets = self._ids(batch, "targets", total) if scores else [-1] * total
        if self._parts.embedding is None and ("hidden" not in batch.tensors or batch.tensors["hidden"].shape[0] != total):
            raise StageError(f"this stage needs hidden states of {total} positions")
        if len({row.session for row in batch.rows}) < len(batch.rows):
            raise StageError("a session has two rows in one batch")
        steps, start, needed = [], 0, 0
        for row in batch.rows:
            session = self._continued(row)
            own = slice(start, start + row.length)
            steps.append(Step(row, session, start, self._resolve(row.session, tokens[own]), targets[own]))
            needed += self._cache.needed(session.table, row.position + row.length)
            start += row.length
        if self._cache.keys:
            self._cache.check_free(needed)
        return steps

    def _continued(self, row: Row) -> Session:
        """The session that a row continues. Raises StageError when it does not."""
        session = self._find(row.session)
        if row.position != session.table.length:
            raise StageError(
                f"session {row.session} is at position {session.table.length}, the row at {row.position}; "
                "a batch was lost or doubled"
            )
        if row.length < 1 or not 0 <= row.want.sample <= row.length:
            raise StageError(f"session {row.session}: a row of {row.length} positions cannot draw {row.want.sample} tokens")
        if row.position + row.length > self._spec.context:
            raise StageError(f"session {row.session} would pass the context of {self._spec.context} positions")
        return session

    def _ids(self, batch: Batch, name: str, total: int) -> list[int]:
        found = int32_values(batch.tensors[name]) if name in batch.tensors else []
        if len(found) != total:
            raise StageError(f"{total} {name} are needed, {len(found)} came")
        if any(not -1 <= token < self._config.vocab_size for token in found):
            raise StageError(f"{name} hold an id outside the vocabulary of {self._config.vocab_size}")
        return found

    def _resolve(self, session: int, tokens: Sequence[int]) -> Sequence[int]:
        if SAMPLED not in tokens:
            return tokens
        sampled = self._find(session).sampled
        if tokens[0] != SAMPLED or SAMPLED in tokens[1:] or sampled is None or self._parts.embedding is None:
            raise StageError("a token to be taken from the last draw, where there was none")
        return [sampled, *tokens[1:]]

    def _run(self, batch: Batch, steps: Sequence[Step]) -> Batch:
        plan = self._plan(steps)
        tokens = hidden = None
        if self._parts.embedding is not None:
            tokens = torch.tensor([t for step in steps for t in step.tokens], device=self._device)
        else:
            hidden = hidden_from_wire(batch.tensors["hidden"], self._device, self._dtype)
        out = self._parts.hidden(tokens, hidden, plan, self._cache)
        for step in steps:
            if self._reads_tokens:
                step.session.tokens += step.tokens
        if self._parts.head is None:
            named = next((s.session.spec.wire_dtype for s in steps if s.session.spec.wire_dtype), "")
            kept = not named or (named == SCALED and plan.drawn)
            wire_dtype = FROM_TORCH[self._spec.dtypes.stored] if kept else named
            return Batch(batch.rows, {"hidden": hidden_to_wire(out, wire_dtype)})
        answers = Answers(self._parts.head)
        asked = [Asked(s.row, s.start, s.session.tokens, s.session.spec, s.targets, s.session.grammar) for s in steps]
        for step, drawn in zip(steps, answers.collect(out, asked), strict=True):
            step.session.sampled = drawn[-1] if drawn else None
        return Batch(batch.rows, answers.tensors())

    def _plan(self, steps: Sequence[Step]) -> StepPlan:
        rows, spans = [], list[Span]()
        for step in steps:
            table, row = step.session.table, step.row
            end = row.position + row.length
            self._cache.extend(table, end)
            rows.append(RowPlan(step.start, row.length, row.position, table))
            spans.append((row.position, end, step.session.spec.prompt_length))
        drawn = all(step.row.want.sample == step.row.length for step in steps)
        return StepPlan(rows, *self._rotary.of(spans), drawn)
