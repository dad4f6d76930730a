"""A text completion: whole, or as the chunks of a stream; with `echo` and the prompt's own log-probabilities."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from msgspec import UNSET

from cake_core.events import TokenEvent
from cake_core.model import Tokenizer
from cake_server import sse
from cake_server.schemas.completions import Completion, CompletionChoice, CompletionLogprobs
from cake_server.text.answers import Answers, Update, clean
from cake_server.text.logprobs import CompletionScores, joined
from cake_server.tools.pieces import Content


@dataclass(frozen=True, slots=True)
class CompletionMeta:
    """As `ChatMeta`; `prompts` has one entry a choice."""

    id: str
    created: int
    model: str
    fingerprint: str
    tokenizer: Tokenizer
    prompts: Sequence[tuple[int, ...]]
    echo: bool = False
    logprobs: bool = False
    token_ids: bool = False
    usage: bool = False
    continuous_usage: bool = False


class CompletionWriter:
    """Turns updates into choices; keeps for each choice where its text offsets are."""

    def __init__(self, meta: CompletionMeta, answers: Answers) -> None:
        self._meta, self._answers = meta, answers
        self._scores = [CompletionScores(meta.tokenizer) for _ in meta.prompts]

    def echo(self, update: Update) -> tuple[str, CompletionLogprobs | None]:
        """The prompt as text, and its scores, once it has been forwarded."""
        meta, done = self._meta, update.prompt
        ids = meta.prompts[update.index]
        scores = done.scores if done is not None and meta.logprobs else None
        text = clean(meta.tokenizer.decode(ids, skip_special=False))
        return text, None if scores is None else self._scores[update.index].prompt(ids, scores)

    def answer(self, index: int, tokens: Sequence[TokenEvent]) -> CompletionLogprobs | None:
        return self._scores[index].answer(tokens) if self._meta.logprobs else None

    def body(self, choices: list[CompletionChoice]) -> Completion:
        meta = self._meta
        return Completion(
            id=meta.id, created=meta.created, model=meta.model, system_fingerprint=meta.fingerprint, choices=choices
        )

    async def frames(self) -> AsyncIterator[bytes]:
        async for bunch in self._answers.updates():
            yield b"".join([self._frame(update) for update in bunch])
        if self._meta.usage:
            last = self.body([])
            last.usage, last.timings = self._answers.usage(), self._answers.timings()
            yield sse.data(last)
        yield sse.DONE

    def _frame(self, update: Update) -> bytes:
        text, scores = self._content(update)
        if not (text or update.tokens or update.finish):
            return b""
        choice = CompletionChoice(index=update.index, text=text, logprobs=scores, finish_reason=update.finish)
        if self._meta.token_ids:
            choice.token_ids = [event.token for event in update.tokens]
        body = self.body([choice])
        if self._meta.continuous_usage:
            body.usage = self._answers.usage()
        elif self._meta.usage:
            body.usage = None
        return sse.data(body)

    def _content(self, update: Update) -> tuple[str, CompletionLogprobs | None]:
        text = clean("".join(piece.text for piece in update.pieces if isinstance(piece, Content)))
        echoed = self._meta.echo and update.prompt is not None
        prefix, before = self.echo(update) if echoed else ("", None)
        scores = self.answer(update.index, update.tokens)
        if before is not None and scores is not None:
            scores = joined(before, scores)
        return prefix + text, scores

    async def collect(self) -> Completion:
        texts: list[list[str]] = [[] for _ in self._meta.prompts]
        scores: list[CompletionLogprobs | None] = [None for _ in self._meta.prompts]
        ids: list[list[int]] = [[] for _ in self._meta.prompts]
        finish = ["stop" for _ in self._meta.prompts]
        async for bunch in self._answers.updates():
            for update in bunch:
                text, new = self._content(update)
                texts[update.index].append(text)
                ids[update.index] += [event.token for event in update.tokens]
                old = scores[update.index]
                scores[update.index] = joined(old, new) if old is not None and new is not None else new or old
                finish[update.index] = update.finish or finish[update.index]
        body = self.body(
            [
                CompletionChoice(
                    index=index,
                    text="".join(texts[index]),
                    logprobs=scores[index],
                    finish_reason=finish[index],
                    token_ids=ids[index] if self._meta.token_ids else UNSET,
                    prompt_token_ids=list(prompt) if self._meta.token_ids else UNSET,
                )
                for index, prompt in enumerate(self._meta.prompts)
            ]
        )
        body.usage, body.timings = self._answers.usage(), self._answers.timings()
        return body
