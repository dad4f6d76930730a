"""A stage on an NVIDIA GPU: decode steps by graph, launched without waiting and completed by a thread of their own; prompt
chunks as on any device."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cake_core.errors import CakeError, CapacityError, StageError
from cake_core.model import SAMPLED, Batch, Pending, SessionSpec
from cake_core.sampling import uniform
from cake_llama.answers import Answers, Asked
from cake_llama.cache import KvCache
from cake_llama.cuda.draws import Draws
from cake_llama.cuda.graphs import SIZES, Entry, Graphs
from cake_llama.model import Parts
from cake_llama.rotary import Rotary
from cake_llama.stage import LlamaStage, Session, StageSpec, Step
from cake_llama.wire import SCALED, TO_TORCH, hidden_from_wire, to_wire

WAITED_FOR = 4
"""Rows up to which a stage with neighbours waits for the device itself: handing a step to another thread costs more than the
little that could be done meanwhile."""


@dataclass(slots=True)
class _Flight:
    """A decode step under way."""

    batch: Batch
    steps: Sequence[Step]
    pending: Pending
    done: torch.cuda.Event
    host: Tensor | None = None  # tokens or hidden states on their way to the host
    logits: Tensor | None = None  # kept where a row needs more than a token


class CudaStage(LlamaStage):
    """`runs_ahead`: it holds the whole way from token to token, so a row may ask for the token drawn last."""

    def __init__(self, spec: StageSpec, parts: Parts, cache: KvCache, rotary: Rotary) -> None:
        super().__init__(spec, parts, cache, rotary)
        self.runs_ahead = parts.embedding is not None and parts.head is not None
        self._graphs = Graphs(spec.config, parts, cache, rotary, spec.context, self._dtype)
        self._slots: dict[int, int] = {}
        self._free_slots = list(range(len(self._graphs.last) - 1, 0, -1))
        self._flights: queue.SimpleQueue[_Flight | None] = queue.SimpleQueue()
        self._landed = threading.Condition()
        self._in_flight = 0
        self._flying: Counter[int] = Counter()
        self._detailed_under_way = False
        self._thread = threading.Thread(target=self._land, name="cake-cuda", daemon=True)
        self._thread.start()

    # Sessions

    def open(self, session: int, spec: SessionSpec, parent: int | None = None, length: int = 0) -> int:
        if parent is not None:
            self._drain()
        if not self._free_slots:
            raise StageError(f"more than {len(self._graphs.last) - 1} sessions at once")
        kept = super().open(session, spec, parent, length)
        self._slots[session] = self._free_slots.pop()
        return kept

    def truncate(self, session: int, length: int) -> int:
        self._drain()
        return super().truncate(session, length)

    def close(self, session: int) -> None:
        super().close(session)
        slot = self._slots.pop(session, None)
        if slot is not None:
            self._free_slots.append(slot)

    def shutdown(self) -> None:
        self._drain()
        self._flights.put(None)
        self._thread.join(10.0)
        del self._graphs
        super().shutdown()

    # Batches

    def submit(self, batch: Batch) -> Pending:
        pending = Pending()
        try:
            with torch.inference_mode(), torch.cuda.device(self._device):
                self._submit(batch, pending)
        except CakeError as error:
            pending.fail(error)
        except torch.OutOfMemoryError as error:
            pending.fail(CapacityError(f"{self._device} ran out of memory: {error}; use fewer requests or less context"))
        return pending

    def _submit(self, batch: Batch, pending: Pending) -> None:
        if any(row.length > 1 or row.want.score or row.want.hidden for row in batch.rows) or len(batch.rows) > SIZES[-1]:
            self._drain()
            pending.set(self._mixed(batch))
            return
        if self._detailed_under_way or not self._graphs.ready(len(batch.rows)):
            self._drain()  # tokens drawn on landing are not in `last` yet; a capture wants the device for itself
        steps = self._check(batch)
        if any(_needs_history(step) for step in steps):
            self._drain()
        entries = [self._entry(step) for step in steps]
        hidden = None
        if self._parts.embedding is None:
            hidden = hidden_from_wire(batch.tensors["hidden"], self._device, self._dtype)
        out, best = self._graphs.run(entries, hidden)
        flight = _Flight(batch, steps, pending, torch.cuda.Event())  # type: ignore[no-untyped-call]
        if best is None:
            flight.host = self._to_host(self._outgoing(out, steps))
        elif all(_is_plain(step) for step in steps):
            flight.host = self._to_host(self._draw(out, best, steps, entries))
        else:
            flight.logits = out.clone()
            self._detailed_under_way = True
        flight.done.record()
        with self._landed:
            alone = self._in_flight == 0
            self._in_flight += 1
            self._flying.update(row.session for row in batch.rows)
        if alone and not self.runs_ahead and len(batch.rows) <= WAITED_FOR:
            self._complete(flight)
        else:
            self._flights.put(flight)

    def _mixed(self, batch: Batch) -> Batch:
        """Prompt chunks and single positions together: the single ones by graph, the chunks on the common way."""
        parts = list(batch.split())
        single = [i for i, row in enumerate(batch.rows) if row.length == 1 and not (row.want.score or row.want.hidden)]
        results: dict[int, Batch] = {}
        if single and len(single) <= SIZES[-1]:
            joined = Pending()
            self._check(batch)  # all of it, before anything is changed
            self._submit(Batch.join([parts[i] for i in single]), joined)
            results |= dict(zip(single, joined.result().split_results(), strict=True))
        rest = [i for i in range(len(parts)) if i not in results]
        joined_rest = Batch.join([parts[i] for i in rest])
        results |= dict(zip(rest, self._run(joined_rest, self._check(joined_rest)).split_results(), strict=True))
        return Batch.join([results[i] for i in range(len(parts))])

    def _entry(self, step: Step) -> Entry:
        session, row = step.session, step.row
        self._cache.extend(session.table, row.position + 1)
        token = step.tokens[0] if self._reads_tokens else 0
        return Entry(token, row.position, self._slots[row.session], session.table)

    def _resolve(self, session: Session, tokens: Sequence[int]) -> Sequence[int]:
        """The token drawn last is taken on the device; what it was is known when its step has landed."""
        with self._landed:
            drawing = any(self._flying[number] for number, found in self._sessions.items() if found is session)
        if list(tokens) == [SAMPLED] and self.runs_ahead and drawing:
            return tokens
        return super()._resolve(session, tokens)

    def _outgoing(self, hidden: Tensor, steps: Sequence[Step]) -> Tensor:
        named = next((s.session.spec.wire_dtype for s in steps if s.session.spec.wire_dtype), "")
        return hidden.to(TO_TORCH[named]) if named not in ("", SCALED) else hidden

    def _draw(self, logits: Tensor, best: Tensor, steps: Sequence[Step], entries: Sequence[Entry]) -> Tensor:
        """Tokens of every row, left in `last` as well; nothing waits."""
        sampled = [step.session.spec.sampling for step in steps]
        if all(params.temperature == 0 for params in sampled):
            return best
        specs = [step.session.spec for step in steps]
        uniforms = [uniform(s.sampling.seed, s.choice, step.row.position + 1) for s, step in zip(specs, steps, strict=True)]
        tokens = Draws(sampled, uniforms, self._device).draw(logits, best)
        if self.runs_ahead:
            slots = torch.tensor([entry.slot for entry in entries], device=self._device)
            self._graphs.last.index_copy_(0, slots, tokens)
        return tokens

    def _to_host(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        return host

    # Landing

    def _drain(self) -> None:
        """Waits until every step under way has landed."""
        with self._landed:
            self._landed.wait_for(lambda: self._in_flight == 0)
            self._detailed_under_way = False

    def _land(self) -> None:
        torch.cuda.set_device(self._device)
        while (flight := self._flights.get()) is not None:
            self._complete(flight)

    def _complete(self, flight: _Flight) -> None:
        try:
            with torch.inference_mode():
                result = self._result(flight)
        except Exception as error:
            # Whatever went wrong on the device ends this batch, not the thread that completes all of them.
            text = f"{self._device}: {type(error).__name__}: {error}"
            self._set_down(flight)
            flight.pending.fail(error if isinstance(error, CakeError) else StageError(text))
        else:
            self._set_down(flight)
            flight.pending.set(result)

    def _set_down(self, flight: _Flight) -> None:
        with self._landed:
            self._in_flight -= 1
            self._flying.subtract(row.session for row in flight.batch.rows)
            self._landed.notify_all()

    def _result(self, flight: _Flight) -> Batch:
        flight.done.synchronize()
        for step in flight.steps:
            if self._reads_tokens:
                token = step.tokens[0]
                step.session.tokens.append((step.session.sampled or 0) if token == SAMPLED else token)
        if flight.host is not None and self._parts.head is None:
            return Batch(flight.batch.rows, {"hidden": to_wire(flight.host)})
        if flight.host is not None:
            tokens = flight.host.tolist()
            for step, token in zip(flight.steps, tokens, strict=True):
                step.session.sampled = token
            return Batch(flight.batch.rows, {"tokens": to_wire(flight.host.to(torch.int32))})
        return self._detailed(flight)

    def _detailed(self, flight: _Flight) -> Batch:
        """Rows that asked for log-probabilities, or whose draws depend on what was said before."""
        assert flight.logits is not None  # noqa: S101 - one of the two is always there
        answers = Answers(lambda x: x)
        asked = [Asked(s.row, i, s.session.tokens, s.session.spec, (), s.session.grammar) for i, s in enumerate(flight.steps)]
        for step, drawn in zip(flight.steps, answers.collect(flight.logits, asked), strict=True):
            if drawn:
                step.session.sampled = drawn[-1]
                self._graphs.last[self._slots.get(step.row.session, 0)] = drawn[-1]
        return Batch(flight.batch.rows, answers.tensors())


def _needs_history(step: Step) -> bool:
    spec = step.session.spec
    return spec.grammar is not None or spec.sampling.needs_history


def _is_plain(step: Step) -> bool:
    """Whether a row asks for a token and nothing else, and nothing but the logits decides it."""
    return step.row.want.sample == 1 and step.row.want.top < 0 and not _needs_history(step)
