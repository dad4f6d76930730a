"""The parsers: one for calls between tags, one for an answer that is JSON as a whole, two for forced calls."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator

from cake_server.tools.calls import Call, as_call, json_calls
from cake_server.tools.pieces import CallArguments, CallStart, Content, Piece, held_back, new_call_id, whole_call

Reader = Callable[[str, Collection[str]], "list[Call] | None"]


class TaggedParser:
    """Calls between `begin` and `end` (None: to the end of the answer), among ordinary text."""

    def __init__(self, begin: str, end: str | None, read: Reader, known: Collection[str]) -> None:
        self._begin, self._end, self._read, self._known = begin, end, read, known
        self._text = ""
        self._inside = False
        self._calls = 0

    def feed(self, text: str) -> Iterator[Piece]:
        self._text += text
        while True:
            marker = self._end if self._inside else self._begin
            before, found, after = self._text.partition(marker) if marker else (self._text, "", "")
            if not found:
                break
            self._text = after
            yield from self._body(before, found) if self._inside else self._content(before.rstrip())
            self._inside = not self._inside
        if not self._inside:
            yield from self._certain()

    def finish(self) -> Iterator[Piece]:
        if self._inside:
            yield from self._body(self._text, "")
        elif not self._calls or self._text.strip():
            yield from self._content(self._text)

    def _certain(self) -> Iterator[Piece]:
        """Text that cannot belong to a tag. Blanks wait too: before a call they mean nothing."""
        keep = held_back(self._text, (self._begin,))
        sure = self._text[: len(self._text) - keep].rstrip()
        self._text = self._text[len(sure) :]
        yield from self._content(sure)

    def _body(self, body: str, end: str) -> Iterator[Piece]:
        calls = self._read(body.strip(), self._known)
        if calls is None:
            yield from self._content(self._begin + body + end)
            return
        for name, arguments in calls:
            yield from whole_call(self._calls, name, arguments)
            self._calls += 1

    def _content(self, text: str) -> Iterator[Piece]:
        if text:
            yield Content(text)


_FIRST_KEY = re.compile(r'\s*(?:```(?:json)?\s*)?\[?\s*\{\s*"([^"]*)"')
_CALL_KEYS = ("name", "function", "type", "parameters", "arguments", "id")
_FENCE = "```json"


def _undecided(text: str) -> bool:
    """Whether a JSON answer has not come as far as the end of its first key, or may yet turn out to be one."""
    start = text.lstrip()
    if _FENCE.startswith(start):
        return True
    start = start.removeprefix(_FENCE).removeprefix("```").lstrip().removeprefix("[").lstrip()
    if not start.startswith("{"):
        return not start
    key = start[1:].lstrip()
    return not key or (key[0] == '"' and '"' not in key[1:])


class JsonAnswerParser:
    """An answer that is nothing but a call in JSON (Llama 3, and models nobody taught a format). As soon as the first key
    shows that it is no call, text flows again."""

    def __init__(self, known: Collection[str]) -> None:
        self._known = known
        self._text = ""
        self._plain = False

    def feed(self, text: str) -> Iterator[Piece]:
        self._text += text
        if not self._plain:
            key = _FIRST_KEY.match(self._text)
            self._plain = key[1] not in _CALL_KEYS if key else not _undecided(self._text)
        if self._plain and self._text:
            held, self._text = self._text, ""
            yield Content(held)

    def finish(self) -> Iterator[Piece]:
        body = self._text.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
        calls = None if self._plain else json_calls(body, self._known)
        if calls is None:
            if self._text:
                yield Content(self._text)
            return
        for index, (name, arguments) in enumerate(calls):
            yield from whole_call(index, name, arguments)


class EitherParser:
    """Tagged calls, or an answer that is a call as a whole: what Llama 3 does, with and without its python tag."""

    def __init__(self, tagged: TaggedParser, known: Collection[str]) -> None:
        self._json, self._tagged = JsonAnswerParser(known), tagged

    def feed(self, text: str) -> Iterator[Piece]:
        yield from self._through(self._json.feed(text))

    def finish(self) -> Iterator[Piece]:
        yield from self._through(self._json.finish())
        yield from self._tagged.finish()

    def _through(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if isinstance(piece, Content):
                yield from self._tagged.feed(piece.text)
            else:
                yield piece


class ForcedParser:
    """The grammar lets nothing pass but the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = False

    def feed(self, text: str) -> Iterator[Piece]:
        if not self._started:
            self._started = True
            yield CallStart(0, new_call_id(), self._name)
        if text:
            yield CallArguments(0, text)

    def finish(self) -> Iterator[Piece]:
        if not self._started:
            yield from self.feed("")


class RequiredParser:
    """The grammar lets nothing pass but an array of calls; each is told when its last brace has come."""

    def __init__(self, known: Collection[str]) -> None:
        self._known = known
        self._text = ""
        self._position = 0
        self._calls = 0

    def feed(self, text: str) -> Iterator[Piece]:
        self._text += text
        while "}" in text:
            while self._position < len(self._text) and self._text[self._position] in "[, \n\t\r":
                self._position += 1
            try:
                value, self._position = json.JSONDecoder().raw_decode(self._text, self._position)
            except ValueError:
                return
            call = as_call(value, self._known)
            if call is not None:
                yield from whole_call(self._calls, *call)
                self._calls += 1

    def finish(self) -> Iterator[Piece]:
        rest = self._text[self._position :].strip("[], \n\t\r")
        if rest:
            yield Content(rest)
