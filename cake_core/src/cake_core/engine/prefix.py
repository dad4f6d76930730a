"""Sessions kept after their requests ended, because a later prompt may begin with the same tokens. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix, by halving slices: comparing slices is much faster than a loop."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class PrefixCache:
    """Idle sessions by least recent use. The scheduler's ledger still counts their blocks."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[int, list[int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, session: int, tokens: list[int]) -> int | None:
        """Keeps a session that holds `tokens`; returns the one that has to go for it, if any."""
        if self._most < 1:
            return session
        self._kept[session] = tokens
        return self.evict() if len(self._kept) > self._most else None

    def evict(self) -> int | None:
        """Forgets the session used longest ago; None when there is none."""
        return self._kept.popitem(last=False)[0] if self._kept else None

    def find(self, tokens: Sequence[int], running: Iterable[tuple[int, Sequence[int]]]) -> tuple[int, int] | None:
        """(session, length) with the longest prefix of `tokens`, among kept and running ones; one token always remains to
        be forwarded. None when nothing is shared."""
        best: tuple[int, int] | None = None
        for session, held in [*self._kept.items(), *running]:
            length = min(common_prefix(tokens, held), len(tokens) - 1)
            if length > (best[1] if best else 0):
                best = session, length
        if best is not None and best[0] in self._kept:
            self._kept.move_to_end(best[0])
        return best

    def used_up(self, session: int, length: int) -> bool:
        """Whether a kept session is of no further use once `length` of it lives on in another one; forgets it then."""
        held = self._kept.get(session)
        if held is None or length < len(held) - 1:
            return False
        del self._kept[session]
        return True

    def clear(self) -> list[int]:
        """Forgets all and returns them."""
        sessions = list(self._kept)
        self._kept.clear()
        return sessions
