"""Splits what a model thinks (`<think>…</think>`) from what it answers."""

from __future__ import annotations

from collections.abc import Iterator

from cake_server.tools.pieces import Parser, Piece, Reasoning, held_back

OPEN, CLOSE = "<think>", "</think>"


class ReasoningParser:
    """Reasoning stands at the beginning of an answer or nowhere; what follows goes through `inner`. Line breaks around the
    tags belong to neither.

    `inside`: the prompt ended with the opening tag already, as some templates do.
    """

    def __init__(self, inner: Parser, inside: bool) -> None:
        self._inner = inner
        self._text = ""
        self._state = "inside" if inside else "before"
        self._at_break = inside
        """Line breaks that come next are dropped."""

    def feed(self, text: str) -> Iterator[Piece]:
        self._text += text
        if self._state == "before":
            self._open()
        if self._at_break:
            self._text = self._text.lstrip("\n")
            self._at_break = not self._text
        if self._state == "inside":
            yield from self._think()
        if self._state == "after" and self._text:
            rest, self._text = self._text, ""
            yield from self._inner.feed(rest)

    def finish(self) -> Iterator[Piece]:
        if self._text:
            held = self._text
            yield from (Reasoning(held),) if self._state == "inside" else self._inner.feed(held)
        yield from self._inner.finish()

    def _open(self) -> None:
        """Decides, once it is certain, whether the answer begins with reasoning."""
        start = self._text.lstrip()
        if start.startswith(OPEN):
            self._text, self._state, self._at_break = start[len(OPEN) :], "inside", True
        elif not OPEN.startswith(start):
            self._state = "after"

    def _think(self) -> Iterator[Piece]:
        before, found, after = self._text.partition(CLOSE)
        if found:
            sure = before.rstrip("\n")
            self._text, self._state = after.lstrip("\n"), "after"
            self._at_break = not self._text
        else:
            sure = self._text[: len(self._text) - held_back(self._text, (CLOSE,))].rstrip("\n")
            self._text = self._text[len(sure) :]
        if sure:
            yield Reasoning(sure)


def answer_parser(inner: Parser, template: str, prompt: str) -> Parser:
    """`inner`, behind a splitter where the model's template knows reasoning."""
    if CLOSE not in template:
        return inner
    return ReasoningParser(inner, prompt.rstrip().endswith(OPEN))
