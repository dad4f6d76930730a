"""Splits what a model thinks (`<think>…</think>`) from what it answers."""

from __future__ import annotations

from collections.abc import Iterator

from cake_server.tools.pieces import Parser, Piece, Reasoning, held_back

OPEN, CLOSE = "<think>", "</think>"


class ReasoningParser:
    """Reasoning stands at the beginning of an answer or nowhere; what follows goes through `inner`.

    `inside`: the prompt ended with the opening tag already, as some templates do.
    """

    def __init__(self, inner: Parser, inside: bool) -> None:
        self._inner = inner
        self._text = ""
        self._state = "inside" if inside else "before"

    def feed(self, text: str) -> Iterator[Piece]:
        if self._state == "after":
            yield from self._inner.feed(text)
            return
        self._text += text
        if self._state == "before" and not self._opened():
            return
        if self._state == "inside":
            yield from self._thinking()
        if self._state == "after" and self._text:
            rest, self._text = self._text, ""
            yield from self._inner.feed(rest)

    def finish(self) -> Iterator[Piece]:
        if self._text:
            held = self._text
            yield from (Reasoning(held),) if self._state == "inside" else self._inner.feed(held)
        yield from self._inner.finish()

    def _opened(self) -> bool:
        """Decides, once it is certain, whether the answer begins with reasoning."""
        start = self._text.lstrip()
        if start.startswith(OPEN):
            self._text, self._state = start[len(OPEN) :].lstrip("\n"), "inside"
        elif not OPEN.startswith(start):
            self._state = "after"
        return self._state != "before"

    def _thinking(self) -> Iterator[Piece]:
        before, found, after = self._text.partition(CLOSE)
        if found:
            self._text, self._state = after.lstrip("\n"), "after"
            sure = before.rstrip("\n")
        else:
            keep = held_back(self._text, (CLOSE, "\n" + CLOSE))
            sure, self._text = self._text[: len(self._text) - keep], self._text[len(self._text) - keep :]
        if sure:
            yield Reasoning(sure)


def answer_parser(inner: Parser, template: str, prompt: str) -> Parser:
    """`inner`, behind a splitter where the model's template knows reasoning."""
    if CLOSE not in template:
        return inner
    return ReasoningParser(inner, prompt.rstrip().endswith(OPEN))
