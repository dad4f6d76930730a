"""One sequence's life: ids forwarded and drawn, text that became certain, and when to stop. No thread, no stage."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass, field

from cake_core.detokenize import Detokenizer
from cake_core.engine.speculation import Guessing, Tally
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
        former: its session on a route that was lost, and how many positions of it are certain, until it goes on from them.
        in_flight: batches under way that have a row of it. drawing: tokens that they will draw.
        guesses: ids that the row under way has after its certain one. rewind: the stages hold positions beyond `forwarded`, of
            guesses that were wrong. guessing: what is known to guess from.
        rewound: how many tokens it had when it was last computed again because a stage could not go back.
        scored: prompt positions whose scores have been asked for already.
        limit: tokens, prompt included, at which it ends.
    """

    request: TextRequest
    sink: Sink
    detokenizer: Detokenizer
    limit: int
    order: int
    tokens: list[int] = field(default_factory=list)
    session: int | None = None
    former: tuple[int, int] | None = None
    forwarded: int = 0
    in_flight: int = 0
    drawing: int = 0
    guesses: list[int] = field(default_factory=list)
    rewind: bool = False
    rewound: int = 0
    guessing: Guessing | None = None
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
    def certain(self) -> int:
        """Positions forwarded whose results are not needed any more: no guesses, and not the one that the next draw is of."""
        request = self.request
        if request.embed or (request.score_prompt and not self.generated):
            return 0
        return min(self.forwarded, len(self.tokens) - 1)

    @property
    def may_run_ahead(self) -> bool:
        """Whether the next position can go although its token is only being drawn: nothing but the model decides it."""
        request = self.request
        plain = request.logprobs is None and request.grammar is None and not request.sampling.needs_history
        waits = self.in_flight == 1 and self.drawing == 1 and self.remaining == 0
        return plain and waits and len(self.tokens) + 1 < self.limit

    @property
    def may_be_guessed(self) -> bool:
        """A grammar refuses to follow a wrong guess; anything else is decided position by position."""
        return self.request.grammar is None

    def goes_back(self) -> bool:
        """Whether it is computed again after a stage lost part of it: once for each token drawn."""
        first, self.rewound = len(self.tokens) > self.rewound, len(self.tokens)
        return first

    @property
    def room(self) -> int:
        """Guesses that can turn out right before the answer is at its limit, which the draw after them counts towards."""
        return self.limit - len(self.tokens) - 1

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
        """To the next session: what was forwarded is forgotten, what was drawn stays."""
        self.session = None
        self.forwarded = 0
        self.guesses = []
        self.rewind = False
        self.hidden = []
        if not self.generated:
            self.scores, self.scored = [None], 0

    def usage(self) -> Usage:
        guesses = self.guessing.own if self.guessing is not None else Tally()
        return Usage(self.prompt_length, self.generated, self.cached, guesses.proposed, guesses.accepted)

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

    def count_guesses(self, proposed: int = 0, accepted: int = 0) -> None:
        if self.guessing is not None:
            self.guessing.count(proposed, accepted)

    def settle(self, before: int) -> None:
        """After the draws of a row, of which the text has taken those from index `before` on: what its guesses were worth."""
        drawn = self.tokens[before:]
        if self.guessing is not None:
            self.guessing.learn(drawn)
        if self.guesses:
            self.forwarded = len(self.tokens) - 1
            self.rewind = len(drawn) <= len(self.guesses)
            self.guesses = []

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
