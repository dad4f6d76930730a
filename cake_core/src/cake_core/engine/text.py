"""The text engine: one loop in one thread around the scheduler. It alone opens and closes sessions and touches sequences.

Everything else only posts to its inbox: new requests, cancellations, completed batches, changes of the cluster.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Generator
from collections.abc import Sequence as List
from dataclasses import dataclass, replace
from typing import Protocol

from cake_core.detokenize import Detokenizer
from cake_core.engine.ledger import Ledger
from cake_core.engine.pipeline import Pipeline
from cake_core.engine.results import apply_results
from cake_core.engine.scheduler import Limits, Scheduler, Step
from cake_core.engine.sequence import Sequence, Sink
from cake_core.errors import (
    CakeError,
    Cancelled,
    CapacityError,
    ContextLengthError,
    DeadlineExceeded,
    NodeError,
    QueueFullError,
    TransportError,
)
from cake_core.events import Failed, Finished, PromptProgress, TextEvent
from cake_core.model import SAMPLED, Batch, ModelInfo, Tensor, Tokenizer, int32_tensor
from cake_core.requests import TextRequest

log = logging.getLogger(__name__)


class Watch(Protocol):
    """Whether every node is there; the engine waits up to `rejoin` seconds for one that is not."""

    rejoin: float

    def missing(self) -> CakeError | None: ...


class Handle:
    """A submitted request."""

    def __init__(self, engine: TextEngine, sequence: Sequence) -> None:
        self._engine = engine
        self._sequence = sequence

    def cancel(self) -> None:
        """Ends the request; it still gets a Finished("cancelled") unless it ended before. Never blocks."""
        self._engine.post(_Cancel(self._sequence))


@dataclass(frozen=True, slots=True)
class EngineStats:
    running: int
    waiting: int
    kv_tokens: int
    kv_tokens_used: int
    """Kept prefixes included."""
    prefixes: int
    """Ended sessions kept for prompts that begin alike."""
    preemptions: int
    positions: int
    """Positions forwarded since the start."""
    batches: int


@dataclass(frozen=True, slots=True)
class _Submit:
    sequence: Sequence


@dataclass(frozen=True, slots=True)
class _Cancel:
    sequence: Sequence


@dataclass(frozen=True, slots=True)
class _Completed:
    step: Step
    batch: Batch | None
    error: CakeError | None


@dataclass(frozen=True, slots=True)
class _Wake:
    """The cluster changed, or the engine closes."""


_Post = _Submit | _Cancel | _Completed | _Wake


class TextEngine:
    """Serves text requests over a pipeline until `close`."""

    def __init__(
        self,
        info: ModelInfo,
        tokenizer: Tokenizer,
        pipeline: Pipeline,
        limits: Limits | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.info = info
        self._tokenizer = tokenizer
        self._pipeline = pipeline
        self._limits = limits or Limits()
        if pipeline.runs_ahead:
            self._limits = replace(self._limits, depth=2, ahead=True)
        self._watch = watch
        kv_tokens = pipeline.kv_tokens()
        self._scheduler = Scheduler(self._limits, Ledger(kv_tokens // info.kv_block, info.kv_block))
        self._inbox: queue.SimpleQueue[_Post] = queue.SimpleQueue()
        self._in_flight = 0
        self._orders = itertools.count()
        self._queued = 0
        self._closed = False
        self._degraded_since: float | None = None
        self._positions = 0
        self._batches = 0
        self._thread = threading.Thread(target=self._loop, name="cake-engine", daemon=True)
        self._thread.start()

    # From any thread

    def submit(self, request: TextRequest, sink: Sink) -> Handle:
        """Queues a request. `sink` gets all events of one step in one call, from the engine's thread; it must neither
        block nor raise. The last event is one Finished or Failed.

        Raises:
            ContextLengthError: prompt and answer do not fit the context.
            CapacityError: the prompt does not fit the KV cache even alone. QueueFullError: too many are waiting.
            NodeError: a node is missing for longer than the rejoin time.
        """
        self._check(request)
        context = self.info.context_length or 1 << 30
        room = context - len(request.prompt)
        limit = len(request.prompt) + (room if request.max_tokens is None else min(request.max_tokens, room))
        stops = Detokenizer(
            self._tokenizer.stream(request.prompt, skip_special=request.skip_special), request.stop, request.include_stop
        )
        sequence = Sequence(request, sink, stops, limit, next(self._orders))
        self.post(_Submit(sequence))
        return Handle(self, sequence)

    def _check(self, request: TextRequest) -> None:
        context = self.info.context_length or 1 << 30
        length, wanted = len(request.prompt), request.max_tokens
        if length + (1 if wanted is None else min(wanted, 1)) > context:
            raise ContextLengthError(
                f"This model's maximum context length is {context} tokens. However, the prompt has {length}; shorten it, "
                "or start with a larger --context",
                "prompt",
            )
        ledger = self._scheduler.ledger
        if ledger.capacity and ledger.blocks(length + 1) > ledger.capacity:
            raise CapacityError(
                f"the prompt of {length} tokens does not fit the KV cache of {ledger.capacity * ledger.block} tokens; "
                "shorten it, or give more with --kv-tokens"
            )
        outside = next((t for t in request.prompt if not 0 <= t < (self.info.vocab_size or 1 << 31)), None)
        if outside is not None:
            raise ContextLengthError(f"token {outside} is not in the vocabulary of {self.info.vocab_size}", "prompt")
        if self._closed:
            raise Cancelled("the engine is shutting down")
        if len(self._scheduler.waiting) >= self._limits.queue:
            raise QueueFullError(f"{self._limits.queue} requests are waiting already; try again later")
        missing = self._watch.missing() if self._watch else None
        if missing is not None and self._expired(time.monotonic()):
            raise missing

    def generate(self, request: TextRequest) -> Generator[TextEvent, None, None]:
        """The events of one request. Closing the iterator cancels; a Failed is raised as its error."""
        events: queue.SimpleQueue[List[TextEvent]] = queue.SimpleQueue()
        handle = self.submit(request, events.put)
        ended = False
        try:
            while not ended:
                for event in events.get():
                    ended = isinstance(event, Finished | Failed)
                    if isinstance(event, Failed):
                        raise event.error
                    yield event
        finally:
            if not ended:
                handle.cancel()

    def stats(self) -> EngineStats:
        scheduler, ledger = self._scheduler, self._scheduler.ledger
        return EngineStats(
            len(scheduler.running),
            len(scheduler.waiting),
            ledger.capacity * ledger.block,
            ledger.used * ledger.block,
            len(scheduler.prefixes),
            scheduler.preemptions,
            self._positions,
            self._batches,
        )

    def wake(self) -> None:
        """Has the loop look at the cluster again."""
        self.post(_Wake())

    def post(self, item: _Post) -> None:
        self._inbox.put(item)

    def close(self) -> None:
        """Cancels everything and ends the loop. Idempotent."""
        self._closed = True
        self.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(30.0)

    # The loop

    def _loop(self) -> None:
        while not self._closed or self._in_flight:
            try:
                for sequence in self._take_posts():
                    sequence.deliver()
                if not self._closed:
                    self._fill()
            except Exception as error:
                # The loop carries everybody's requests: it must outlive any bug, loudly.
                log.exception("the engine failed at a step")
                self._fail_all(CakeError(f"internal error: {error}"))
        self._fail_all(Cancelled("the engine was shut down"))

    def _take_posts(self) -> list[Sequence]:
        """Waits for at least one post and handles all there are. Returns the sequences that have events."""
        touched: dict[int, Sequence] = {}
        post: _Post | None = self._wait()
        while post is not None:
            match post:
                case _Submit(sequence):
                    self._scheduler.add(sequence)
                case _Cancel(sequence):
                    self._cancel(sequence)
                    touched[sequence.order] = sequence
                case _Completed():
                    touched.update((s.order, s) for s in self._completed(post))
                case _Wake():
                    pass
            try:
                post = self._inbox.get_nowait()
            except queue.Empty:
                post = None
        return list(touched.values())

    def _wait(self) -> _Post | None:
        degraded = self._degraded_since is not None
        try:
            return self._inbox.get(timeout=0.25 if degraded else None)
        except queue.Empty:
            return None

    def _fill(self) -> None:
        """Launches batches until enough are in flight or nothing can go."""
        self._close_sessions()
        if not self._ready():
            return
        while self._in_flight < max(1, self._limits.depth):
            self._scheduler.admit()
            self._open_sessions()
            step = self._scheduler.next()
            self._close_sessions()
            if step is None:
                self._resolve_stuck()
                return
            self._launch(step)

    def _close_sessions(self) -> None:
        closes, self._scheduler.to_close = self._scheduler.to_close, []
        for session in closes:
            self._pipeline.close(session)

    def _open_sessions(self) -> None:
        """Opens what was admitted, then closes what is to go: a session may start from one that is about to be closed."""
        opens, self._scheduler.to_open = self._scheduler.to_open, []
        for sequence, start in opens:
            if sequence.session is None:
                continue
            parent, length = start or (None, 0)
            try:
                kept = self._pipeline.open(sequence.session, sequence.spec(self._pipeline.wire_dtype), parent, length)
            except CakeError as error:
                self._disturbed([sequence], error)
                sequence.deliver()
            else:
                self._scheduler.opened(sequence, kept, parent)
        self._close_sessions()

    def _resolve_stuck(self) -> None:
        stuck = self._scheduler.stuck()
        if stuck is not None and not self._in_flight and stuck.remaining:
            ledger = self._scheduler.ledger
            kv_tokens = ledger.capacity * ledger.block
            error = CapacityError(
                f"{len(stuck.tokens)} tokens do not fit the KV cache of {kv_tokens}; give more with --kv-tokens"
            )
            self._end(stuck, error)
            stuck.deliver()
            self.wake()

    def _launch(self, step: Step) -> None:
        alive = [(s, r) for s, r in zip(step.sequences, step.rows, strict=True) if s.session == r.session]
        if not alive:
            self.wake()
            return
        step.sequences, step.rows = [s for s, _ in alive], [r for _, r in alive]
        batch = Batch(tuple(step.rows), _inputs(step))
        self._in_flight += 1
        self._positions += batch.positions
        self._batches += 1
        self._pipeline.submit(batch, lambda result, error: self.post(_Completed(step, result, error)))

    def _completed(self, post: _Completed) -> list[Sequence]:
        self._in_flight -= 1
        step = post.step
        for sequence, row in zip(step.sequences, step.rows, strict=True):
            sequence.in_flight -= 1
            sequence.drawing -= row.want.sample
        current = [i for i, s in enumerate(step.sequences) if s.session == step.rows[i].session]
        if post.error is not None:
            self._disturbed([step.sequences[i] for i in current], post.error)
        elif post.batch is not None:
            for index, result in apply_results(step.rows, post.batch):
                sequence = step.sequences[index]
                if index in current and not sequence.unwanted:
                    result.apply(sequence)
            for index in current:
                self._after(step.sequences[index])
        for sequence in step.sequences:
            if sequence.unwanted and not sequence.in_flight and not sequence.ended:
                sequence.finish("cancelled")
            if sequence.ended and not sequence.in_flight:
                self._scheduler.remove(sequence)
        return step.sequences

    def _after(self, sequence: Sequence) -> None:
        """Progress and ends that do not come with a token."""
        if sequence.generated == 0 and not sequence.ended:
            total = sequence.prompt_length
            if sequence.remaining == 0 and not sequence.in_flight and not sequence.generates:
                sequence.prompt_done()
                sequence.finish("length")
            elif total > self._limits.chunk:
                sequence.events.append(PromptProgress(min(sequence.forwarded, total), total))

    def _cancel(self, sequence: Sequence) -> None:
        sequence.unwanted = True
        if not sequence.in_flight and not sequence.ended:
            sequence.finish("cancelled")
            self._scheduler.remove(sequence)

    def _disturbed(self, sequences: List[Sequence], error: CakeError) -> None:
        """A batch failed: its sequences are computed again if time can mend it, or end."""
        if isinstance(error, NodeError | TransportError) and not isinstance(error, DeadlineExceeded) and self._watch:
            log.warning("computing %d sequences again: %s", len(sequences), error)
            self._scheduler.forget_prefixes()
            for sequence in sequences:
                if sequence in self._scheduler.running:
                    self._scheduler.requeue(sequence)
            self._degraded_since = self._degraded_since or time.monotonic()
            return
        if isinstance(error, CapacityError):
            ledger = self._scheduler.ledger
            ledger.capacity = max(1, min(ledger.capacity or ledger.used, ledger.used) - 1)
            if len(self._scheduler.running) > 1:
                for sequence in sequences:
                    if sequence in self._scheduler.running:
                        self._scheduler.requeue(sequence)
                return
        for sequence in sequences:
            self._end(sequence, error)

    def _end(self, sequence: Sequence, error: CakeError) -> None:
        sequence.fail(error)
        if not sequence.in_flight:
            self._scheduler.remove(sequence)

    def _expired(self, now: float) -> bool:
        since = self._degraded_since
        return since is not None and self._watch is not None and now - since > self._watch.rejoin

    def _ready(self) -> bool:
        """Whether every node is there. While one is missing nothing is launched; after the rejoin time all fails."""
        missing = self._watch.missing() if self._watch else None
        if missing is None:
            self._degraded_since = None
            return True
        now = time.monotonic()
        if self._degraded_since is None:
            self._degraded_since = now
        self._scheduler.forget_prefixes()
        for sequence in [s for s in self._scheduler.running if not s.in_flight]:
            self._scheduler.requeue(sequence)
        if self._expired(now):
            self._fail_all(missing)
        return False

    def _fail_all(self, error: CakeError) -> None:
        self._scheduler.forget_prefixes()
        for sequence in self._scheduler.sequences():
            self._end(sequence, error)
            sequence.deliver()
        self._close_sessions()


def _inputs(step: Step) -> dict[str, Tensor]:
    tokens: list[int] = []
    targets: list[int] = []
    for sequence, row in zip(step.sequences, step.rows, strict=True):
        stop = row.position + row.length
        # What has not been drawn yet is taken where it will be.
        tokens += sequence.tokens[row.position : stop] or [SAMPLED]
        if row.want.score:
            known = [*sequence.tokens[row.position + 1 : min(stop + 1, sequence.prompt_length)]]
            targets += known + [-1] * (row.length - len(known))
        else:
            targets += [-1] * row.length
    tensors = {"tokens": int32_tensor(tokens)}
    if any(row.want.score for row in step.rows):
        tensors["targets"] = int32_tensor(targets)
    return tensors
