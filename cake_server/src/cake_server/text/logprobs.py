"""Log-probabilities in the two shapes OpenAI has for them."""

from __future__ import annotations

from collections.abc import Sequence

from cake_core.events import TokenEvent, TokenLogprob
from cake_core.model import Tokenizer
from cake_server.schemas.common import ChoiceLogprobs, TokenLogprobBody, TokenLogprobs
from cake_server.schemas.completions import CompletionLogprobs

FLOOR = -9999.0
"""What minus infinity becomes: JSON has no such number."""


def clamp(value: float) -> float:
    return max(value, FLOOR) if value == value else FLOOR  # NaN is not itself


def chat_logprobs(tokens: Sequence[TokenEvent], tokenizer: Tokenizer) -> ChoiceLogprobs:
    """`logprobs.content`, one entry a token."""
    content = []
    for event in tokens:
        if event.logprob is None:
            continue
        token = _entry(tokenizer, event.token, event.logprob.logprob)
        top = [_entry(tokenizer, other, value) for other, value in event.logprob.top]
        content.append(TokenLogprobs(token.token, token.logprob, token.bytes, top))
    return ChoiceLogprobs(content)


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> TokenLogprobBody:
    raw = tokenizer.token_bytes(token)
    return TokenLogprobBody(raw.decode("utf-8", "replace"), clamp(logprob), list(raw))


class CompletionScores:
    """The legacy shape, for prompt (with `echo`) and answer, with offsets that run through both."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def prompt(self, ids: Sequence[int], scores: Sequence[TokenLogprob | None]) -> CompletionLogprobs:
        return self._shape(list(zip(ids, scores, strict=True)))

    def answer(self, tokens: Sequence[TokenEvent]) -> CompletionLogprobs:
        return self._shape([(event.token, event.logprob) for event in tokens])

    def _shape(self, items: Sequence[tuple[int, TokenLogprob | None]]) -> CompletionLogprobs:
        result = CompletionLogprobs([], [], [], [])
        for token, score in items:
            text = token_text(self._tokenizer, token)
            result.tokens.append(text)
            result.text_offset.append(self._offset)
            self._offset += len(text)
            result.token_logprobs.append(None if score is None else clamp(score.logprob))
            result.top_logprobs.append(None if score is None else self._top(text, score))
        return result

    def _top(self, text: str, score: TokenLogprob) -> dict[str, float]:
        """The alternatives and the token itself, with the very same number: evaluators compare the two for equality."""
        top = {text: clamp(score.logprob)}
        for other, value in score.top:
            if other != score.token:
                top.setdefault(token_text(self._tokenizer, other), clamp(value))
        return top


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as text, unmistakable also where it is half a character: `bytes:\\xe2\\x80`."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        first.top_logprobs + second.top_logprobs,
        first.text_offset + second.text_offset,
    )
