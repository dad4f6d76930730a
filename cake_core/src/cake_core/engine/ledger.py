"""KV memory as the scheduler sees it: blocks of positions, taken as they are forwarded, on the tightest stage. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Ledger:
    """Every session takes the same number of blocks on every stage, so the stage with the fewest decides.

    `capacity` in blocks of `block` positions; 0 means that no stage keeps a cache and nothing is counted.
    """

    capacity: int
    block: int = 16
    _held: dict[int, int] = field(default_factory=dict)
    used: int = 0

    def blocks(self, positions: int) -> int:
        return -(-positions // self.block)

    @property
    def free(self) -> int:
        return max(0, self.capacity - self.used) if self.capacity else 1 << 60

    def needs(self, session: int, positions: int) -> int:
        """Further blocks that a session would take to hold `positions`."""
        return max(0, self.blocks(positions) - self._held.get(session, 0))

    def fits(self, session: int, positions: int) -> bool:
        return self.needs(session, positions) <= self.free

    def take(self, session: int, positions: int) -> None:
        """Counts a session up to `positions`."""
        more = self.needs(session, positions)
        self._held[session] = self._held.get(session, 0) + more
        self.used += more

    def shrink(self, session: int, positions: int) -> None:
        """Counts a session down to `positions`."""
        held = self._held.get(session, 0)
        kept = min(held, self.blocks(positions))
        self._held[session] = kept
        self.used -= held - kept

    def rename(self, session: int, other: int) -> None:
        """`other` takes the place of a session."""
        self._held[other] = self._held.pop(session, 0)

    def release(self, session: int) -> None:
        self.used -= self._held.pop(session, 0)

    @property
    def sessions(self) -> frozenset[int]:
        return frozenset(self._held)
