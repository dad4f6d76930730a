"""Streams answers to the terminal and measures them."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from cake_core.cli.console import human_seconds, note, plural
from cake_core.cli.opening import opened_text
from cake_core.events import Finished, TokenEvent

if TYPE_CHECKING:
    from cake_core.checkpoint import Checkpoint
    from cake_core.cli.options import ModelFlags
    from cake_core.cli.text_options import TextFlags
    from cake_core.engine.text import TextEngine
    from cake_core.plugins import Plugins
    from cake_core.requests import TextRequest


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask; a seed of None is drawn."""

    prompt: str
    seed: int | None = None

    def chosen_seed(self) -> int:
        # 32 bits are plenty for a seed, and short enough to type again.
        return secrets.randbits(32) if self.seed is None else self.seed


@dataclass(slots=True)
class Meter:
    """Times of one answer, in seconds of a monotonic clock."""

    start: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    reason: str = "interrupted"

    def count(self, now: float) -> None:
        self.first = now if self.first is None else self.first
        self.last = now
        self.tokens += 1

    def summary(self) -> str:
        """`42 tokens, first after 0.31 s, 24.5 tokens/s`: the rate is that of the tokens after the first."""
        if self.first is None:
            return f"no tokens ({self.reason})"
        parts = [plural(self.tokens, "token"), f"time to first token {human_seconds(self.first - self.start)}"]
        if self.tokens > 1 and self.last > self.first:
            parts.append(f"{(self.tokens - 1) / (self.last - self.first):.1f} tokens/s")
        if self.reason != "stop":
            parts.append({"length": "stopped at the limit of tokens"}.get(self.reason, self.reason))
        return ", ".join(parts)


def answer(plugins: Plugins, flags: ModelFlags, checkpoint: Checkpoint, text: TextFlags, question: Question) -> None:
    """Opens the model, answers once on stdout, and ends with a line of measurements on stderr."""
    seed = question.chosen_seed()
    text.check(seed)
    with opened_text(plugins, flags, checkpoint) as runtime:
        tokenizer = runtime.tokenizer
        if text.raw or not tokenizer.has_chat_template:
            if not text.raw:
                note("this model has no chat template, so it continues the prompt as it is")
            request = text.raw_request(tokenizer, question.prompt, seed)
        else:
            request = text.chat_request(tokenizer, text.messages(question.prompt), seed)
        note(f"seed {seed}, {plural(len(request.prompt), 'prompt token')}")
        note()
        print_answer(runtime.engine, request)


def print_answer(engine: TextEngine, request: TextRequest) -> None:
    """Streams one answer to stdout, then its measurements to stderr, also when it is interrupted."""
    meter, ended = Meter(), True
    try:
        for piece in pieces(engine, request, meter):
            sys.stdout.write(piece)
            sys.stdout.flush()
            ended = piece.endswith("\n")
    finally:
        if not ended:
            click.echo()
        note()
        note(meter.summary())


def pieces(engine: TextEngine, request: TextRequest, meter: Meter) -> Iterator[str]:
    """The answer's text as it becomes certain. Raises what the request failed with."""
    for event in engine.generate(request):
        if isinstance(event, TokenEvent):
            meter.count(time.monotonic())
            if event.text:
                yield event.text
        elif isinstance(event, Finished):
            meter.reason = event.reason
            if event.text:
                yield event.text
