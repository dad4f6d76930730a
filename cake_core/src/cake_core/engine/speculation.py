"""Guessing the next tokens, so that one way through the stages may give several of them. Pure: times are told, not read.

A decode row may carry guesses after its one certain token. The stage with `lm_head` draws after every position of the row;
as long as a draw is what was guessed, the next draw is as good as if the guess had been forwarded alone, because a draw
depends on seed and position only. So the text is the same with and without guesses, at any temperature; what was guessed
wrong is taken back by the sequence's next row (`Row.rewind`).

How many to send is weighed each time: what a step costs by its positions (`Pace`), and how often guesses like these have
been right (`Trust`). Guesses that are not worth sending are compared with the draws all the same, so trust is never stale.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

MOST = 48
"""Guesses a row carries at most, unless the user says another number."""

_SHORTEST, _LONGEST = 2, 32
"""Tokens that must agree before a place in the text is taken for the present one, and how far back is compared."""
_PLACES = 8
"""Places remembered for each pair of tokens."""
_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True, slots=True)
class Speculation:
    """What the user asked for: `most` guesses a row; `everywhere`: also with stages on a GPU, whose single steps run ahead of
    the engine or are one graph each: that is better than guessing as a rule."""

    most: int = MOST
    everywhere: bool = False


class Lookup:
    """Guesses out of the sequence's own tokens: what followed the last time the text stood like this."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, int], deque[int]] = {}
        self._learnt = _SHORTEST

    def guess(self, tokens: Sequence[int], most: int) -> tuple[list[int], int]:
        """(up to `most` guesses, how many tokens before them agree); `tokens` is what it was before, and more."""
        for place in range(self._learnt, len(tokens)):
            pair = tokens[place - 2], tokens[place - 1]
            self._after.setdefault(pair, deque(maxlen=_PLACES)).append(place)
        self._learnt = max(self._learnt, len(tokens))
        best, agreeing = 0, 0
        for place in reversed(self._after.get((tokens[-2], tokens[-1]), ()) if len(tokens) >= _SHORTEST else ()):
            length = _common_suffix(tokens, place)
            if length > agreeing:
                best, agreeing = place, length
        if not agreeing:
            return [], 0
        # A copy that reaches the end of the text goes on with itself: that is how a repetition continues.
        found = list(tokens[best : best + most])
        period = len(tokens) - best
        while len(found) < most:
            found.append(found[len(found) - period])
        return found, agreeing


def _common_suffix(tokens: Sequence[int], place: int) -> int:
    """How many tokens before `place` are those at the end, at most _LONGEST."""
    end, length = len(tokens), 0
    while length < min(place, _LONGEST) and tokens[place - 1 - length] == tokens[end - 1 - length]:
        length += 1
    return length


class Trust:
    """How often guesses turn out right, by how much spoke for them: the bit length of the tokens that agreed, 0 for a draft
    model's."""

    _RATE = 0.1

    def __init__(self) -> None:
        self._right = {0: 0.7, 2: 0.4, 3: 0.6, 4: 0.8, 5: 0.9, 6: 0.95}

    def of(self, agreeing: int) -> float:
        return self._right[agreeing.bit_length()]

    def learn(self, agreeing: int, guesses: Sequence[int], drawn: Sequence[int]) -> None:
        """Compares as far as both go, up to the first that differs."""
        level = agreeing.bit_length()
        for guess, token in zip(guesses, drawn, strict=False):
            self._right[level] += self._RATE * ((guess == token) - self._right[level])
            if guess != token:
                return


@dataclass(slots=True)
class Tally:
    """Guesses that were forwarded, and those of them that were right."""

    proposed: int = 0
    accepted: int = 0


@dataclass(slots=True)
class Guessing:
    """What is known of one sequence: its text, how good its guesses were, and what comes next as far as anybody can tell.

    `total` counts for all sequences, `own` for this one. `guesses` may be more than are sent. `agreeing` tokens spoke for
    them, 0 where a draft model did. `drafted_at`: tokens there were when it was last asked.
    """

    total: Tally = field(default_factory=Tally)
    own: Tally = field(default_factory=Tally)
    lookup: Lookup = field(default_factory=Lookup)
    trust: Trust = field(default_factory=Trust)
    guesses: list[int] = field(default_factory=list)
    agreeing: int = 0
    drafted_at: int = 0

    def look_up(self, tokens: Sequence[int], most: int) -> None:
        self.guesses, self.agreeing = self.lookup.guess(tokens, most)

    def count(self, proposed: int = 0, accepted: int = 0) -> None:
        for tally in (self.total, self.own):
            tally.proposed += proposed
            tally.accepted += accepted

    def learn(self, drawn: Sequence[int]) -> None:
        """Takes the draws that have become part of the text."""
        self.trust.learn(self.agreeing, self.guesses, drawn)
        self.guesses = []


class Pace:
    """Seconds that a step takes by the number of its positions, learnt from the steps there were."""

    _RATE = 0.2
    _SMALL = 7
    """Bit length of the positions from which a step is large: of those only the seconds a position matter."""
    _STALE = 256
    """Steps after which a size that was not seen is tried again: what it cost may have been an accident."""

    def __init__(self) -> None:
        self._steps = 0
        self._sizes: dict[int, tuple[float, float, int]] = {}
        """By bit length: mean positions, mean seconds, the step it was last seen at."""
        self._per_position: float | None = None

    def observe(self, positions: int, seconds: float) -> None:
        self._steps += 1
        size = positions.bit_length()
        if size > self._SMALL:
            each = seconds / positions
            self._per_position = each if self._per_position is None else min(self._per_position, each)
            return
        mean, known, _ = self._sizes.get(size, (float(positions), seconds, 0))
        mean += self._RATE * (positions - mean)
        self._sizes[size] = mean, known + self._RATE * (seconds - known), self._steps

    def seconds(self, positions: int) -> float:
        """By the sizes next to it; beyond the largest known one by what a position of a prompt costs. 0: nothing is known."""
        known = sorted((n, s) for n, s, seen in self._sizes.values() if self._steps - seen < self._STALE)
        below = max((point for point in known if point[0] <= positions), default=None)
        above = min((point for point in known if point[0] > positions), default=None)
        if below is None:
            return above[1] if above else positions * (self._per_position or 0.0)
        if above is None:
            return below[1] + (positions - below[0]) * (self._per_position or 0.0)
        share = (positions - below[0]) / (above[0] - below[0])
        return below[1] + share * (above[1] - below[1])


@dataclass(frozen=True, slots=True)
class Crowd:
    """The batch that a row will be part of: `rows` of other sequences, one token each, and their `positions`."""

    rows: int = 0
    positions: int = 0


def best_length(right: float, most: int, crowd: Crowd, seconds: Callable[[int], float], each: float = 0.0) -> int:
    """How many guesses give the most tokens a second, if each is right with probability `right` and costs `each` to make."""

    def rate(length: int) -> float:
        expected = length + 1.0 if right >= 1 else (1 - right ** (length + 1)) / (1 - right)
        return (crowd.rows + expected) / max(1e-9, seconds(crowd.positions + 1 + length) + length * each)

    # A little more than none must be gained: the estimates are not exact, and a guess is work.
    best, found = 0, 1.02 * rate(0)
    for length in dict.fromkeys(min(length, most) for length in _LENGTHS if most):
        if (own := rate(length)) > found:
            best, found = length, own
    return best
