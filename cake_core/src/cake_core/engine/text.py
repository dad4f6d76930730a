"""The text engine as its callers see it: requests in, events out. The work is done by its loop."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace

from cake_core.cluster.chain import Places, Router
from cake_core.detokenize import Detokenizer
from cake_core.engine.ledger import Ledger
from cake_core.engine.loop import Loop
from cake_core.engine.pipeline import Pipeline
from cake_core.engine.posts import Cancel, Submit, Wake
from cake_core.engine.scheduler import Limits, Scheduler
from cake_core.engine.sequence import Sequence, Sink
from cake_core.engine.speculation import Tally
from cake_core.engine.speculator import Speculator
from cake_core.engine.stream import events_of
from cake_core.engine.watch import Watch
from cake_core.errors import Cancelled, CapacityError, ContextLengthError, QueueFullError
from cake_core.events import TextEvent
from cake_core.model import ModelInfo, Tokenizer
from cake_core.requests import TextRequest
from cake_core.stages.stage import Stage


class Handle:
    """A submitted request."""

    def __init__(self, loop: Loop, sequence: Sequence) -> None:
        self._loop = loop
        self._sequence = sequence

    def cancel(self) -> None:
        """Ends the request; it still gets a Finished("cancelled") unless it ended before. Never blocks."""
        self._loop.post(Cancel(self._sequence))


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
    seconds: float
    """For which batches have been on their way through the stages, added up."""
    proposed: int = 0
    accepted: int = 0
    """Guessed tokens that were forwarded, and those of them that were right."""
    legs: Mapping[Places, float] = field(default_factory=dict)
    """Of `seconds` those of each leg. What its stages did not compute in that time went to wires and waiting."""


class TextEngine:
    """Serves text requests over a pipeline until `close`."""

    def __init__(
        self,
        info: ModelInfo,
        tokenizer: Tokenizer,
        pipeline: Pipeline,
        limits: Limits | None = None,
        watch: Watch | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        self.info = info
        self._tokenizer = tokenizer
        self._pipeline = pipeline
        self._limits = limits or Limits()
        if speculator is not None and not speculator.speculation.everywhere and pipeline.on_gpu:
            speculator = None
        if pipeline.runs_ahead and speculator is None:
            self._limits = replace(self._limits, depth=2, ahead=True)
        kv_tokens = pipeline.kv_tokens()
        self._scheduler = Scheduler(self._limits, Ledger(kv_tokens // info.kv_block, info.kv_block), speculator)
        self._orders = itertools.count()
        self._loop = Loop(pipeline, self._scheduler, self._limits, watch)

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
        self._loop.post(Submit(sequence))
        return Handle(self._loop, sequence)

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
        if self._loop.closed:
            raise Cancelled("the engine is shutting down")
        if len(self._scheduler.waiting) >= self._limits.queue:
            raise QueueFullError(f"{self._limits.queue} requests are waiting already; try again later")
        unavailable = self._loop.unavailable()
        if unavailable is not None:
            raise unavailable

    def generate(self, request: TextRequest) -> Generator[TextEvent, None, None]:
        """The events of one request. Closing the iterator cancels; a Failed is raised as its error."""
        return events_of(lambda sink: self.submit(request, sink))

    def stats(self) -> EngineStats:
        scheduler, ledger = self._scheduler, self._scheduler.ledger
        guesses = scheduler.speculator.tally if scheduler.speculator is not None else Tally()
        return EngineStats(
            len(scheduler.running),
            len(scheduler.waiting),
            ledger.capacity * ledger.block,
            ledger.used * ledger.block,
            len(scheduler.prefixes),
            scheduler.preemptions,
            self._loop.positions,
            self._loop.batches,
            self._pipeline.seconds,
            guesses.proposed,
            guesses.accepted,
            dict(self._pipeline.legs),
        )

    def wake(self) -> None:
        """Has the loop look at the cluster again."""
        self._loop.post(Wake())

    def restage(self, stages: tuple[Stage, ...], router: Router) -> None:
        """Goes on over other stages with the same layers, after a node was lost; requests are computed again."""
        self._pipeline.restage(stages, router)
        self._scheduler.ledger.capacity = self._pipeline.kv_tokens() // self.info.kv_block
        self.wake()

    def close(self) -> None:
        """Cancels everything and ends the loop. Idempotent."""
        self._loop.close()
