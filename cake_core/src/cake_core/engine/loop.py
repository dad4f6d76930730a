"""The engine's loop: one thread that alone touches sequences and opens or closes sessions.

Everything else only posts to its inbox: new requests, cancellations, completed batches, changes of the cluster.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence as List

from cake_core.engine.inputs import batch_of
from cake_core.engine.pipeline import Pipeline
from cake_core.engine.posts import Cancel, Completed, Post, Submit, Wake
from cake_core.engine.results import apply_results
from cake_core.engine.scheduler import Limits, Scheduler
from cake_core.engine.sequence import Sequence
from cake_core.engine.step import Step
from cake_core.engine.watch import Watch
from cake_core.errors import CakeError, Cancelled, CapacityError, DeadlineExceeded, NodeError, RewindError, TransportError
from cake_core.events import PromptProgress

log = logging.getLogger(__name__)


class Loop:
    """Carries every sequence from the queue to its end. `positions` and `batches` count what was forwarded."""

    def __init__(self, pipeline: Pipeline, scheduler: Scheduler, limits: Limits, watch: Watch | None) -> None:
        self.positions = 0
        self.batches = 0
        self.closed = False
        self._pipeline = pipeline
        self._scheduler = scheduler
        self._limits = limits
        self._watch = watch
        self._inbox: queue.SimpleQueue[Post] = queue.SimpleQueue()
        self._in_flight = 0
        self._degraded_since: float | None = None
        """When the first node was lost since a batch last came through: being there is not enough."""
        self._completed_at = 0.0
        self._thread = threading.Thread(target=self._loop, name="cake-engine", daemon=True)
        self._thread.start()

    # From any thread

    def post(self, item: Post) -> None:
        self._inbox.put(item)

    def close(self) -> None:
        """Cancels everything and ends the thread. Idempotent."""
        self.closed = True
        self.post(Wake())
        if threading.current_thread() is not self._thread:
            self._thread.join(30.0)

    def unavailable(self) -> CakeError | None:
        """The node that has been missing for longer than the rejoin time, if one has."""
        missing = self._watch.missing() if self._watch else None
        return missing if missing is not None and self._expired(time.monotonic()) else None

    # In the loop's thread

    def _loop(self) -> None:
        while not self.closed or self._in_flight:
            try:
                for sequence in self._take_posts():
                    sequence.deliver()
                if not self.closed:
                    self._fill()
            except Exception as error:
                # The loop carries everybody's requests: it must outlive any bug, loudly.
                log.exception("the engine failed at a step")
                self._fail_all(CakeError(f"internal error: {error}"))
        self._fail_all(Cancelled("the engine was shut down"))

    def _take_posts(self) -> list[Sequence]:
        """Waits for at least one post and handles all there are. Returns the sequences that have events."""
        touched: dict[int, Sequence] = {}
        post: Post | None = self._wait()
        while post is not None:
            match post:
                case Submit(sequence):
                    self._scheduler.add(sequence)
                case Cancel(sequence):
                    self._cancel(sequence)
                    touched[sequence.order] = sequence
                case Completed():
                    touched.update((s.order, s) for s in self._completed(post))
                case Wake():
                    pass
            try:
                post = self._inbox.get_nowait()
            except queue.Empty:
                post = None
        return list(touched.values())

    def _wait(self) -> Post | None:
        degraded = self._degraded_since is not None
        try:
            return self._inbox.get(timeout=0.25 if degraded else None)
        except queue.Empty:
            return None

    def _fill(self) -> None:
        """Launches batches until enough are in flight or nothing can go."""
        if self._watch is not None and (self._watch.draining or not self._pipeline.stands):
            # A node that drains would wait for sessions that nobody uses, and one that was cut off may not have them any more.
            self._scheduler.forget_prefixes()
        self._close_sessions()
        if not self._ready():
            return
        while self._in_flight < self._scheduler.most_in_flight:
            self._scheduler.admit()
            self._open_sessions()
            if self._scheduler.to_open:  # a node was lost meanwhile
                return
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
                if sequence.former is not None:  # at once: stages that have copied it may need the room
                    self._pipeline.close(sequence.former[0])
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
            self.post(Wake())

    def _launch(self, step: Step) -> None:
        alive = [(s, r) for s, r in zip(step.sequences, step.rows, strict=True) if s.session == r.session]
        if not alive:
            self._scheduler.landed(step)
            self.post(Wake())
            return
        step.sequences, step.rows = [s for s, _ in alive], [r for _, r in alive]
        batch = batch_of(step)
        self._in_flight += 1
        step.launched = time.monotonic()
        self.positions += batch.positions
        self.batches += 1
        self._pipeline.submit(batch, lambda result, error: self.post(Completed(step, result, error)))

    def _completed(self, post: Completed) -> list[Sequence]:
        self._in_flight -= 1
        step = post.step
        self._scheduler.landed(step)
        self._observe(step, time.monotonic())
        for sequence, row in zip(step.sequences, step.rows, strict=True):
            sequence.in_flight -= 1
            sequence.drawing -= row.want.sample
        current = [i for i, s in enumerate(step.sequences) if s.session == step.rows[i].session]
        if post.error is not None:
            self._disturbed([step.sequences[i] for i in current], post.error)
        elif post.batch is not None:
            self._degraded_since = None
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

    def _observe(self, step: Step, now: float) -> None:
        """What a step cost: of several in flight only the time that it kept the next one waiting."""
        if self._scheduler.speculator is not None:
            self._scheduler.speculator.observe(step.positions, now - max(step.launched, self._completed_at))
        self._completed_at = now

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
        """A batch failed: its sequences go on, or are computed again, if time can mend it, or end."""
        if isinstance(error, NodeError | TransportError) and not isinstance(error, DeadlineExceeded) and self._watch:
            self._scheduler.forget_prefixes()
            self._degraded_since = self._degraded_since or time.monotonic()
            if not self._expired(time.monotonic()):
                log.warning("%d sequences go on from what is left of them: %s", len(sequences), error)
                self._scheduler.resume(*sequences)
                return
        if isinstance(error, RewindError):  # wrong guesses are what most often has to be taken back
            if self._scheduler.speculator is not None:
                self._scheduler.speculator.off = True
            again = [sequence for sequence in sequences if sequence.goes_back()]
            log.warning("%d sequences are computed again: %s", len(again), error)
            self._scheduler.requeue(*again)
            sequences = [sequence for sequence in sequences if sequence not in again]
        if isinstance(error, CapacityError):
            ledger = self._scheduler.ledger
            ledger.capacity = max(1, min(ledger.capacity or ledger.used, ledger.used) - 1)
            if len(self._scheduler.running) > 1:
                self._scheduler.requeue(*sequences)
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
            if not self._scheduler.sequences():
                self._degraded_since = None
            return True
        now = time.monotonic()
        if self._degraded_since is None:
            self._degraded_since = now
        self._scheduler.forget_prefixes()
        self._scheduler.resume(*[s for s in self._scheduler.running if not s.in_flight])
        if self._expired(now):
            self._fail_all(missing)
        return False

    def _fail_all(self, error: CakeError) -> None:
        self._scheduler.forget_prefixes()
        for sequence in self._scheduler.sequences():
            self._end(sequence, error)
            sequence.deliver()
        self._close_sessions()
