"""Parts of an answer as they become certain, and how a parser of them looks."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """Tool call `index` of the answer begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A further fragment of the JSON text of call `index`'s arguments."""

    index: int
    text: str


Piece = Content | Reasoning | CallStart | CallArguments


class Parser(Protocol):
    """Text in, pieces out; holds back only what may yet turn out to be something else. Never loses a character of content."""

    def feed(self, text: str) -> Iterable[Piece]: ...

    def finish(self) -> Iterable[Piece]:
        """What was still held back. Called once, last."""


class PlainParser:
    def feed(self, text: str) -> Iterable[Piece]:
        return (Content(text),) if text else ()

    def finish(self) -> Iterable[Piece]:
        return ()


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def whole_call(index: int, name: str, arguments: str) -> list[Piece]:
    return [CallStart(index, new_call_id(), name), CallArguments(index, arguments)]


def merged(pieces: Sequence[Piece]) -> list[Piece]:
    """The same with neighbouring texts of one kind joined: what a slow reader finds waiting becomes one chunk."""
    result: list[Piece] = []
    for kind, group in itertools.groupby(pieces, type):
        if kind is Content:
            result.append(Content("".join(piece.text for piece in group if isinstance(piece, Content))))
        elif kind is Reasoning:
            result.append(Reasoning("".join(piece.text for piece in group if isinstance(piece, Reasoning))))
        else:
            result += group
    return result


def held_back(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of `text` that may be the beginning of a marker."""
    longest = 0
    for marker in markers:
        for size in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:size]):
                longest = size
                break
    return longest
