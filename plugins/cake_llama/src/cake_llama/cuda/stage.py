"""A stage on an NVIDIA GPU. Everything is launched without waiting and completed by a thread of its own: single positions by
graph, rows of several beside them; only what scores a prompt goes the common way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cake_core.errors import CakeError, CapacityError, StageError
from cake_core.model import SAMPLED, Batch, Pending, SessionSpec, int32_tensor
from cake_core.sampling import uniform
from cake_llama.answers import Answers, Asked
from cake_llama.attention import RowPlan
from cake_llama.cache import KvCache
from cake_llama.cuda.draws import Draws
from cake_llama.cuda.flights import Flight, Flights
from cake_llama.cuda.graphs import SIZES, SLOTS, Entry, Graphs, most_likely
from cake_llama.cuda.prompts import Prompts
from cake_llama.cuda.rows import draws_left, rows_of, woven
from cake_llama.model import Parts
from cake_llama.rotary import Rotary
from cake_llama.stage import LlamaStage, StageSpec, Step
from cake_llama.wire import SCALED, as_sent, hidden_from_wire, host_to_wire, on_host

WAITED_FOR = 4
"""Single positions up to which a stage with neighbours waits for the device itself: handing a step to another thread costs more
than the little that could be done meanwhile."""


class CudaStage(LlamaStage):
    """`runs_ahead`: it holds the whole way from token to token, so a row may ask for the token drawn last."""

    def __init__(self, spec: StageSpec, parts: Parts, cache: KvCache, rotary: Rotary) -> None:
        super().__init__(spec, parts, cache, rotary)
        self.runs_ahead = parts.embedding is not None and parts.head is not None
        self._graphs = Graphs(spec.config, parts, cache, rotary, spec.context, self._dtype)
        self._prompts = Prompts(spec.config, parts, cache, self._graphs.angles, self._dtype)
        self._slots: dict[int, int] = {}
        self._free_slots = list(range(SLOTS - 1, 0, -1))
        self._flights = Flights(self._device, self._landed)

    # Sessions

    def open(self, session: int, spec: SessionSpec, parent: int | None = None, length: int = 0) -> int:
        if parent is not None:
            self._flights.drain()
        if not self._free_slots:
            raise StageError(f"more than {SLOTS - 1} sessions at once")
        kept = super().open(session, spec, parent, length)
        self._slots[session] = self._free_slots.pop()
        return kept

    def truncate(self, session: int, length: int) -> int:
        self._flights.drain()
        return super().truncate(session, length)

    def close(self, session: int) -> None:
        super().close(session)
        slot = self._slots.pop(session, None)
        if slot is not None:
            self._free_slots.append(slot)

    def shutdown(self) -> None:
        self._flights.close()
        del self._graphs, self._prompts
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
        singles = sum(row.length == 1 for row in batch.rows)
        scores = self._parts.head is not None and any(row.want.score or row.want.hidden for row in batch.rows)
        if scores or singles > SIZES[-1]:
            self._flights.drain()
            done = super().submit(batch)
            done.when_done(lambda done: pending.fail(done.error) if done.error else pending.set(done.result()))
            return
        if self._flights.detailed or (singles and not self._graphs.ready(singles)):
            self._flights.drain()  # tokens drawn on landing are not in `last` yet; a capture wants the device for itself
        steps = self._check(batch)
        if self._parts.head is not None and any(_needs_history(step) for step in steps):
            self._flights.drain()
        flight = Flight(batch, steps, pending, torch.cuda.Event())  # type: ignore[no-untyped-call]
        try:
            self._launch(flight)
        except BaseException:
            for step in steps:
                self._go_back(step.session, step.row.position)
            raise
        self._flights.add(flight, not self.runs_ahead and singles == len(batch.rows) <= WAITED_FOR)

    def _launch(self, flight: Flight) -> None:
        steps = flight.steps
        singles = [i for i, step in enumerate(steps) if step.row.length == 1]
        longer = [i for i, step in enumerate(steps) if step.row.length > 1]
        hidden = None if self._parts.embedding is not None else self._incoming(flight.batch, not longer)
        out = best = rest = None
        if singles:
            entries = [self._entry(steps[i]) for i in singles]
            own = hidden if hidden is None or not longer else rows_of(hidden, [steps[i] for i in singles])
            out, best = self._graphs.run(entries, own)
        if longer:
            rest = self._run_longer([steps[i] for i in longer], hidden, not singles)
        if self._parts.head is None:
            flight.host = self._to_host(self._outgoing(woven(steps, out, rest, lambda step: step.row.length), steps))
        else:
            self._answer(flight, out, best, rest)
        flight.done.record()

    def _incoming(self, batch: Batch, for_graph: bool) -> Tensor:
        """Hidden states [T, hidden_size]; for a graph, which copies them, on the host."""
        sent = batch.tensors["hidden"]
        if for_graph and sent.dtype != SCALED:
            return on_host(sent, for_device=True)
        return hidden_from_wire(sent, self._device, self._dtype)

    def _entry(self, step: Step) -> Entry:
        session, row = step.session, step.row
        self._cache.extend(session.table, row.position + 1)
        token = step.tokens[0] if self._reads_tokens else 0
        return Entry(token, row.position, self._slots[row.session], session.table)

    def _run_longer(self, steps: Sequence[Step], hidden: Tensor | None, all_of_it: bool) -> Tensor:
        """Rows of several positions, [their positions, hidden_size]."""
        rows, start = [], 0
        for step in steps:
            row = step.row
            self._cache.extend(step.session.table, row.position + row.length)
            rows.append(RowPlan(start, row.length, row.position, step.session.table))
            start += row.length
        own = hidden if hidden is None or all_of_it else rows_of(hidden, steps)
        return self._prompts.run(rows, [token for step in steps for token in step.tokens], own)

    def _resolve(self, session: int, tokens: Sequence[int]) -> Sequence[int]:
        """The token drawn last is taken on the device; what it was is known when its step has landed."""
        if list(tokens) == [SAMPLED] and self.runs_ahead and self._flights.has(session):
            return tokens
        return super()._resolve(session, tokens)

    def _outgoing(self, hidden: Tensor, steps: Sequence[Step]) -> Tensor:
        named = next((s.session.spec.wire_dtype for s in steps if s.session.spec.wire_dtype), "")
        drawn = all(step.row.want.sample == step.row.length for step in steps)
        return hidden if not named or (named == SCALED and drawn) else as_sent(hidden, named)

    def _answer(self, flight: Flight, out: Tensor | None, best: Tensor | None, rest: Tensor | None) -> None:
        """What is asked of the logits: `out` f32 [n, vocabulary] of single positions, and the head's of the `rest`."""
        steps = flight.steps
        flight.drawn = [i for i, step in enumerate(steps) for _ in range(step.row.want.sample)]
        if not flight.drawn:
            return
        if out is None or best is None or rest is not None or len(flight.drawn) < len(steps):
            out = woven(steps, out, self._rest_of_logits(steps, out, rest), lambda step: step.row.want.sample)
            best = most_likely(out)
        if all(_is_plain(steps[i]) for i in flight.drawn):
            flight.host = self._to_host(self._draw(out, best, [steps[i] for i in flight.drawn]))
        else:
            flight.logits = out.clone()

    def _rest_of_logits(self, steps: Sequence[Step], out: Tensor | None, rest: Tensor | None) -> Tensor | None:
        """f32 [draws of longer rows, vocabulary] from their hidden states."""
        places, end = list[int](), 0
        for step in steps:
            if step.row.length > 1:
                end += step.row.length
                places += range(end - step.row.want.sample, end)
        if rest is None or not places or self._parts.head is None:
            return None if out is None else out[:0]
        return self._parts.head(rest[self._on_device(places)]).to(torch.float32)

    def _draw(self, logits: Tensor, best: Tensor, drawn: Sequence[Step]) -> Tensor:
        """A token for each row of logits, those of a step one after another; left in `last` as well; nothing waits."""
        tokens = best
        if any(step.session.spec.sampling.temperature for step in drawn):
            specs = [step.session.spec for step in drawn]
            after = [s.row.position + s.row.length - left for s, left in zip(drawn, draws_left(drawn), strict=True)]
            uniforms = [uniform(s.sampling.seed, s.choice, position) for s, position in zip(specs, after, strict=True)]
            tokens = Draws([spec.sampling for spec in specs], uniforms, self._device).draw(logits, best)
        if self.runs_ahead:
            final = [i for i, left in enumerate(draws_left(drawn)) if left == 0]
            slots = self._on_device([self._slots[drawn[i].row.session] for i in final])
            self._graphs.last.index_copy_(0, slots, tokens if len(final) == len(drawn) else tokens[self._on_device(final)])
        return tokens

    def _on_device(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values).to(self._device, non_blocking=True)

    def _to_host(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        return host

    # Landing

    def _landed(self, flight: Flight) -> Batch:
        for step in flight.steps:
            if self._reads_tokens:
                known = [(step.session.sampled or 0) if token == SAMPLED else token for token in step.tokens]
                step.session.tokens += known
        if self._parts.head is None:
            assert flight.host is not None  # noqa: S101 - hidden states always leave
            return Batch(flight.batch.rows, {"hidden": host_to_wire(flight.host)})
        if flight.logits is not None:
            return self._detailed(flight, flight.logits)
        tokens = [] if flight.host is None else flight.host.tolist()
        for step in flight.steps:
            step.session.sampled = None
        for index, token in zip(flight.drawn, tokens, strict=True):
            flight.steps[index].session.sampled = token
        return Batch(flight.batch.rows, {"tokens": int32_tensor(tokens)})

    def _detailed(self, flight: Flight, logits: Tensor) -> Batch:
        """Rows that asked for log-probabilities, or whose draws depend on what was said before."""
        answers, asked, start = Answers(lambda x: x), list[Asked](), 0
        steps = [step for step in flight.steps if step.row.want.sample]
        for s in steps:
            row = replace(s.row, length=s.row.want.sample)  # there are logits of what is drawn from only
            asked.append(Asked(row, start, s.session.tokens, s.session.spec, (), s.session.grammar))
            start += row.length
        for step, drawn in zip(steps, answers.collect(logits, asked), strict=True):
            step.session.sampled = drawn[-1]
            self._graphs.last[self._slots.get(step.row.session, 0)] = drawn[-1]
        return Batch(flight.batch.rows, answers.tensors())


def _needs_history(step: Step) -> bool:
    spec = step.session.spec
    return spec.grammar is not None or spec.sampling.needs_history


def _is_plain(step: Step) -> bool:
    """Whether a row asks for tokens and nothing else, and nothing but the logits decides them."""
    return step.row.want.top < 0 and not _needs_history(step)
