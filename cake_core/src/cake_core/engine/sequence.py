"""One sequence's life: ids forwarded and drawn, text that became certain, and when to stop. No thread, no stage."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass, field

from cake_core.detokenize import Detokenizer
from cake_core.errors import CakeError
from cake_core.events import Failed, Finished, FinishReason, PromptDone, TextEvent, TokenEvent, TokenLogprob, Usage
from cake_core.model import SessionSpec
from cake_core.requests import TextRequest

Sink = Callable[[List[TextEvent]], None]

_sessions = itertools.count(1)


@dataclass(slots=True, eq=False)
class Sequence:
    """A request under way.

    Attributes:
        tokens: prompt and answer. forwarded: positions submitted to the stages, those in flight included.
        session: its id on the stages while it is open; a new one after every restart, so nothing stale can be taken for it.
        in_flight: batches under way that have a row of it. drawing: tokens that they will draw.
        scored: prompt positions whose scores have been asked for already (a restart does not ask again).
        limit: tokens, prompt included, at which it ends.
    """

    request: TextRequest
    sink: Sink
    detokenizer: Detokenizer
    limit: int
    order: int
    tokens: list[int] = field(default_factory=list)
    session: int | None = None
    forwarded: int = 0
    in_flight: int = 0
    drawing: int = 0
    scored: int = 0
    cached: int = 0
    unwanted: bool = False
    ended: bool = False
    failed: bool = False
    events: list[TextEvent] = field(default_factory=list)
    scores: list[TokenLogprob | None] = field(default_factory=list)
    hidden: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.scores = [None]

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        """Positions known but not forwarded."""
        return len(self.tokens) - self.forwarded

    @property
    def decoding(self) -> bool:
        """Whether the one thing missing is the position of the token drawn last."""
        return self.generated > 0 and self.remaining == 1

    @property
    def may_run_ahead(self) -> bool:
        """Whether the next position can go although its token is only being drawn: nothing but the model decides it."""
        request = self.request
        plain = request.logprobs is None and request.grammar is None and not request.sampling.needs_history
        waits = self.in_flight == 1 and self.drawing == 1 and self.remaining == 0
        return plain and waits and len(self.tokens) + 1 < self.limit

    @property
    def generates(self) -> bool:
        return not self.request.embed and self.limit > self.prompt_length

    def spec(self, wire_dtype: str = "") -> SessionSpec:
        request = self.request
        return SessionSpec(request.sampling, self.prompt_length, request.choice, request.grammar, self.limit, wire_dtype)

    def start(self) -> int:
        """A fresh session for it, nothing forwarded."""
        self.session = next(_sessions)
        self.forwarded = 0
        return self.session

    def restart(self) -> None:
        """Back to the queue: what was forwarded is forgotten, what was drawn stays."""
        self.session = None
        self.forwarded = 0

    def usage(self) -> Usage:
        return Usage(self.prompt_length, self.generated, self.cached)

    def prompt_done(self) -> None:
        scores = tuple(self.scores) if self.request.score_prompt else None
        self.events.append(PromptDone(self.usage(), scores))

    def accept(self, token: int, logprob: TokenLogprob | None) -> None:
        """Takes a drawn token: its text, and whether it ends the answer."""
        request = self.request
        self.tokens.append(token)
        minimum_reached = self.generated > request.sampling.min_tokens
        if not request.ignore_eos and token in request.stop_ids and minimum_reached:
            self.events.append(TokenEvent(token, "", logprob))
            self.finish("stop", token)
            return
        text, stop = self.detokenizer.step(token)
        self.events.append(TokenEvent(token, text, logprob))
        if stop is not None:
            self.finish("stop", stop, flush=False)
        elif len(self.tokens) >= self.limit:
            self.finish("length")

    def finish(self, reason: FinishReason, stop: str | int | None = None, flush: bool = True) -> None:
        self._end(Finished(reason, self.detokenizer.flush() if flush else "", self.usage(), stop))

    def fail(self, error: CakeError) -> None:
        self.failed = True
        self._end(Failed(error, self.usage()))

    def _end(self, event: Finished | Failed) -> None:
        if not self.ended:
            self.ended = True
            self.events.append(event)

    def deliver(self) -> None:
        """Hands the events of this step to the sink, in one call."""
        if self.events:
            events, self.events = self.events, []
            self.sink(events)
