"""A chat completion: whole, or as the chunks of a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET

from cake_core.model import Tokenizer
from cake_server import sse
from cake_server.schemas.chat import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChunkChoice,
    Delta,
    FunctionDelta,
    FunctionOut,
    Message,
    ToolCall,
    ToolCallDelta,
)
from cake_server.schemas.common import ChoiceLogprobs
from cake_server.text.answers import Answers, Update, clean
from cake_server.text.logprobs import chat_logprobs
from cake_server.tools.pieces import CallArguments, CallStart, Content, Piece, Reasoning

PROGRESS = b": prefill_progress "


@dataclass(frozen=True, slots=True)
class ChatMeta:
    """What every chunk of an answer repeats, and what the client asked to see in it."""

    id: str
    created: int
    model: str
    fingerprint: str
    choices: int
    tokenizer: Tokenizer
    logprobs: bool = False
    token_ids: bool = False
    usage: bool = False
    continuous_usage: bool = False
    prompt_ids: tuple[int, ...] = ()


class ChatStream:
    """Chunks as bytes. The plain one, a piece of content and nothing else, is pasted together: it is sent for every token."""

    def __init__(self, meta: ChatMeta, answers: Answers) -> None:
        self._meta, self._answers = meta, answers
        self._plain = not (meta.logprobs or meta.token_ids or meta.continuous_usage)
        self._templates = [self._template(index) for index in range(meta.choices)]

    def _template(self, index: int) -> tuple[bytes, bytes]:
        mark = "\x00"
        frame = self._chunk(index, Delta(content=mark))
        before, after = frame.split(msgspec.json.encode(mark))
        return before, after

    async def frames(self) -> AsyncIterator[bytes]:
        yield b"".join(self._chunk(index, Delta(role="assistant", content="")) for index in range(self._meta.choices))
        async for bunch in self._answers.updates():
            yield b"".join([self._update(update) for update in bunch])
        yield self._usage() + sse.DONE

    def _update(self, update: Update) -> bytes:
        frames = []
        if update.progress is not None:
            frames.append(
                PROGRESS + msgspec.json.encode({"done": update.progress.done, "total": update.progress.total}) + b"\n\n"
            )
        if self._plain:
            frames += [self._piece(update.index, piece) for piece in update.pieces]
        elif update.tokens or update.pieces:
            frames.append(self._full(update))
        if update.finish is not None:
            frames.append(self._chunk(update.index, Delta(), finish=update.finish))
        return b"".join(frames)

    def _piece(self, index: int, piece: Piece) -> bytes:
        if isinstance(piece, Content):
            before, after = self._templates[index]
            return before + msgspec.json.encode(clean(piece.text)) + after
        return self._chunk(index, delta(piece))

    def _full(self, update: Update) -> bytes:
        """All pieces, the first of them with the log-probabilities and ids of every token of the bunch."""
        deltas = [delta(piece) for piece in update.pieces] or [Delta(content="")]
        scores = chat_logprobs(update.tokens, self._meta.tokenizer) if self._meta.logprobs else None
        ids = [event.token for event in update.tokens] if self._meta.token_ids else None
        first = self._chunk(update.index, deltas[0], logprobs=scores, ids=ids)
        return first + b"".join(self._chunk(update.index, item) for item in deltas[1:])

    def _chunk(
        self,
        index: int,
        item: Delta,
        finish: str | None = None,
        logprobs: ChoiceLogprobs | None = None,
        ids: list[int] | None = None,
    ) -> bytes:
        choice = ChunkChoice(index=index, delta=item, logprobs=logprobs, finish_reason=finish)
        if ids is not None:
            choice.token_ids = ids
        body = self._body([choice])
        if finish is not None:
            body.timings = self._answers.timings()
        return sse.data(body)

    def _body(self, choices: list[ChunkChoice]) -> ChatChunk:
        meta = self._meta
        chunk = ChatChunk(
            id=meta.id, created=meta.created, model=meta.model, system_fingerprint=meta.fingerprint, choices=choices
        )
        if meta.continuous_usage:
            chunk.usage = self._answers.usage()
        elif meta.usage:
            chunk.usage = None
        return chunk

    def _usage(self) -> bytes:
        if not self._meta.usage:
            return b""
        chunk = self._body([])
        chunk.usage, chunk.timings = self._answers.usage(), self._answers.timings()
        return sse.data(chunk)


def delta(piece: Piece) -> Delta:
    if isinstance(piece, Content):
        return Delta(content=clean(piece.text))
    if isinstance(piece, Reasoning):
        text = clean(piece.text)
        return Delta(reasoning_content=text, reasoning=text)
    if isinstance(piece, CallStart):
        function = FunctionDelta(piece.name, "")
        return Delta(tool_calls=[ToolCallDelta(piece.index, piece.id, "function", function)])
    return Delta(tool_calls=[ToolCallDelta(piece.index, function=FunctionDelta(arguments=clean(piece.text)))])


class _Collected:
    def __init__(self) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[ToolCall] = []
        self.tokens: list[Any] = []
        self.finish = "stop"

    def add(self, update: Update) -> None:
        self.tokens += update.tokens
        self.finish = update.finish or self.finish
        for piece in update.pieces:
            if isinstance(piece, Content):
                self.content.append(piece.text)
            elif isinstance(piece, Reasoning):
                self.reasoning.append(piece.text)
            elif isinstance(piece, CallStart):
                self.calls.append(ToolCall(piece.id, FunctionOut(piece.name, "")))
            elif isinstance(piece, CallArguments):
                self.calls[piece.index].function.arguments += clean(piece.text)

    def message(self) -> Message:
        text = clean("".join(self.content))
        message = Message(content=text if text.strip() or not self.calls else None)
        if self.calls:
            message.tool_calls = self.calls
        if self.reasoning:
            message.reasoning_content = message.reasoning = clean("".join(self.reasoning))
        return message


async def collect_chat(meta: ChatMeta, answers: Answers) -> ChatCompletion:
    collected = [_Collected() for _ in range(meta.choices)]
    async for bunch in answers.updates():
        for update in bunch:
            collected[update.index].add(update)
    choices = [
        ChatChoice(
            index=index,
            message=item.message(),
            logprobs=chat_logprobs(item.tokens, meta.tokenizer) if meta.logprobs else None,
            finish_reason=item.finish,
            token_ids=[event.token for event in item.tokens] if meta.token_ids else UNSET,
        )
        for index, item in enumerate(collected)
    ]
    return ChatCompletion(
        id=meta.id,
        created=meta.created,
        model=meta.model,
        choices=choices,
        usage=answers.usage(),
        system_fingerprint=meta.fingerprint,
        timings=answers.timings(),
        prompt_token_ids=list(meta.prompt_ids) if meta.token_ids else UNSET,
    )
