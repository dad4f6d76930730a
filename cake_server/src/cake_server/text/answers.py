"""The answers of one request as they come: engine events in, updates per choice out, numbers counted on the way."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

from cake_core.errors import Cancelled
from cake_core.events import Embedding, Failed, Finished, PromptDone, PromptProgress, TextEvent, TokenEvent, TokenLogprob, Usage
from cake_server.bridge import Job
from cake_server.metrics import Metrics
from cake_server.schemas.common import CompletionDetails, PromptDetails, Timings, UsageBody
from cake_server.tools.pieces import CallStart, Parser, Piece, Reasoning, merged

Scores = tuple[TokenLogprob | None, ...]


@dataclass(slots=True)
class Update:
    """What became certain of choice `index` since the last time. `finish` is set once, in its last update."""

    index: int
    pieces: list[Piece] = field(default_factory=list)
    tokens: list[TokenEvent] = field(default_factory=list)
    prompt: PromptDone | None = None
    progress: PromptProgress | None = None
    finish: str | None = None


@dataclass(slots=True)
class _Choice:
    parser: Parser
    usage: Usage | None = None
    tokens: int = 0
    reasoning_tokens: int = 0
    called: bool = False
    last: float = 0.0


class Answers:
    """Reads a job. `per_prompt` answers belong to each prompt, which is counted once."""

    def __init__(self, job: Job[Any, TextEvent], parsers: Iterable[Parser], per_prompt: int, metrics: Metrics) -> None:
        self._job, self._per_prompt, self._metrics = job, per_prompt, metrics
        self._choices = [_Choice(parser) for parser in parsers]
        self._prompt_done: float | None = None
        self._last = job.started
        self.first_token: float | None = None
        self.hidden: frozenset[int] = frozenset()
        """Ids whose text is not shown: stop tokens, where special tokens are."""

    async def updates(self) -> AsyncIterator[list[Update]]:
        """Updates in bunches; an empty bunch when the job was woken with nothing new. Raises what a request failed with."""
        while self._job.more:
            items = await self._job.get()
            bunch: dict[int, Update] = {}
            for index, event, when in items:
                update = bunch.get(index)
                if update is None:
                    update = bunch[index] = Update(index)
                self._take(update, event, when)
            for update in bunch.values():
                if len(update.pieces) > 1:
                    update.pieces = merged(update.pieces)
            yield list(bunch.values())
        self._metrics.finished(time.perf_counter() - self._job.started)

    def _take(self, update: Update, event: TextEvent, when: float) -> None:
        choice = self._choices[update.index]
        self._last = when
        if isinstance(event, TokenEvent):
            self._count(choice, when)
            update.tokens.append(event)
            if event.text and event.token not in self.hidden:
                self._add(update, choice, choice.parser.feed(event.text))
        elif isinstance(event, PromptProgress):
            update.progress = event
        elif isinstance(event, PromptDone):
            update.prompt, choice.usage = event, event.usage
            if self._prompt_done is None:
                self._prompt_done = when
            self._metrics.prompt(event.usage)
        elif isinstance(event, Finished):
            if event.reason == "cancelled":
                raise Cancelled("the request was cancelled")
            self._add(update, choice, choice.parser.feed(event.text))
            self._add(update, choice, choice.parser.finish())
            choice.usage = event.usage
            update.finish = "tool_calls" if choice.called and event.reason == "stop" else event.reason
        elif isinstance(event, Failed):
            raise event.error
        elif isinstance(event, Embedding):
            raise TypeError("an embedding among the events of a generation")

    def _count(self, choice: _Choice, when: float) -> None:
        if choice.tokens == 0:
            self._metrics.first_token.observe(when - self._job.started)
            if self.first_token is None:
                self.first_token = when - self._job.started
        else:
            self._metrics.inter_token.observe(when - choice.last)
        choice.tokens += 1
        choice.last = when
        self._metrics.generation_tokens.inc()

    def _add(self, update: Update, choice: _Choice, pieces: Iterable[Piece]) -> None:
        reasoning = False
        for piece in pieces:
            reasoning = reasoning or isinstance(piece, Reasoning)
            choice.called = choice.called or isinstance(piece, CallStart)
            update.pieces.append(piece)
        choice.reasoning_tokens += reasoning

    def usage(self) -> UsageBody:
        """Tokens so far. A prompt counts once however many answers it has."""
        firsts = self._choices[:: self._per_prompt]
        prompt = sum(c.usage.prompt_tokens for c in firsts if c.usage)
        cached = sum(c.usage.cached_tokens for c in firsts if c.usage)
        completion = sum(max(c.tokens, c.usage.completion_tokens if c.usage else 0) for c in self._choices)
        reasoning = sum(c.reasoning_tokens for c in self._choices)
        return UsageBody(prompt, completion, prompt + completion, PromptDetails(cached), CompletionDetails(reasoning))

    def timings(self) -> Timings:
        """Milliseconds of prompt (its wait in the queue is part of it) and answer, over all choices."""
        usage = self.usage()
        done = self._prompt_done if self._prompt_done is not None else self._last
        prompt, predicted = (done - self._job.started) * 1e3, max(self._last - done, 0.0) * 1e3
        rate = usage.completion_tokens / predicted * 1e3 if predicted else 0.0
        cached = usage.prompt_tokens_details.cached_tokens
        return Timings(
            usage.prompt_tokens, round(prompt, 3), usage.completion_tokens, round(predicted, 3), round(rate, 3), cached
        )


def clean(text: str) -> str:
    """`text` without lone surrogates, which no JSON encoder takes."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
