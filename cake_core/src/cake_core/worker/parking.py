"""Sessions of masters whose links fell, kept for a while: a master that is back in time goes on from what they hold.

They are parked with what the worker has loaded, and end with it. Only the master that opened them has the token they are found
by. Their memory is given up as soon as anybody else needs it.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cake_core.stages.stage import LocalStage

TOKEN = 16
"""Bytes of the secret by which a master finds its sessions again."""
MOST_SECONDS = 60.0
"""Seconds that sessions are kept, whatever a master asks for."""
MOST_SESSIONS = 4096
"""Sessions kept for all masters together; the oldest go first."""

Key = tuple[int, int]
"""A stage's index and the master's number of a session there."""


@dataclass(frozen=True, slots=True, eq=False)
class Lot:
    """What a master left behind when a link fell: the sessions' numbers on the stages here."""

    token: bytes
    sessions: dict[Key, int]
    timer: threading.Timer


class Parking:
    """Any thread may call. Its lock is held while a session is closed, which waits for the stage; never the other way round."""

    def __init__(self, stages: Sequence[LocalStage]) -> None:
        self._stages = stages
        self._lots: list[Lot] = []
        self._lock = threading.Lock()
        self._ended = False

    def park(self, token: bytes, sessions: dict[Key, int], seconds: float) -> None:
        """Keeps sessions for whoever has the token, `seconds` long; with 0 seconds it closes them."""
        lot = Lot(token, sessions, threading.Timer(min(seconds, MOST_SECONDS), lambda: self._give_up(lot)))
        lot.timer.name, lot.timer.daemon = "cake-parking", True
        with self._lock:
            if not sessions or self._ended:  # what the stages held is freed
                return
            self._lots.append(lot)
            if not seconds:
                self._close(lot)
                return
            lot.timer.start()
            while self._count() > MOST_SESSIONS:
                self._close(self._lots[0])

    def take(self, token: bytes, key: Key) -> int | None:
        """Hands a session back to its master, who is there again; None when it is not kept here."""
        with self._lock:
            for lot in self._lots:
                if lot.token == token and key in lot.sessions:
                    own = lot.sessions.pop(key)
                    if not lot.sessions:
                        self._close(lot)
                    return own
        return None

    def keep_only(self, token: bytes, live: Collection[Key] | None) -> None:
        """A master is back and says which of its sessions it still wants (None: all): closes its others."""
        if live is None:
            return
        with self._lock:
            for lot in [lot for lot in self._lots if lot.token == token]:
                for stage, session in [key for key in lot.sessions if key not in live]:
                    self._stages[stage].close(lot.sessions.pop((stage, session)))
                if not lot.sessions:
                    self._close(lot)

    def give_up(self) -> bool:
        """Closes all, because somebody needs the memory; whether there were any."""
        with self._lock:
            found = bool(self._lots)
            for lot in list(self._lots):
                self._close(lot)
        return found

    def end(self) -> None:
        """Closes all, and keeps nothing from now on."""
        with self._lock:
            self._ended = True
        self.give_up()

    @property
    def count(self) -> int:
        """Sessions that are kept now."""
        with self._lock:
            return self._count()

    def _count(self) -> int:
        return sum(len(lot.sessions) for lot in self._lots)

    def _give_up(self, lot: Lot) -> None:
        with self._lock:
            if lot in self._lots:
                self._close(lot)

    def _close(self, lot: Lot) -> None:
        self._lots.remove(lot)
        lot.timer.cancel()
        for (stage, _), own in lot.sessions.items():
            self._stages[stage].close(own)
