"""From ids to text that may be shown: never half a character, never part of a stop string. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from cake_core.model import DecodeStream


class Detokenizer:
    """Wraps a tokenizer's stream and holds back whatever could still become a stop string."""

    def __init__(self, stream: DecodeStream, stops: Sequence[str] = (), include_stop: bool = False) -> None:
        self._stream = stream
        self._stops = tuple(stops)
        self._include = include_stop
        self._held = ""

    def step(self, token: int) -> tuple[str, str | None]:
        """The text that became certain, and the stop string that ended it, if one did."""
        return self._release(self._stream.step(token))

    def flush(self) -> str:
        """Everything held back: no stop string will come any more. Text up to a stop string that completes only now."""
        text, stop = self._release(self._stream.flush())
        if stop is not None:
            return text
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> tuple[str, str | None]:
        if not self._stops:
            return text, None
        text = self._held + text
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            self._held = ""
            return text[: at + len(stop) if self._include else at], stop
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :] if keep else ""
        return text[: len(text) - keep], None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
