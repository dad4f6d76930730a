"""How many connections without proof there may be, and whose must go: bookkeeping, without threads or clocks."""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from cake_core.transport import Channel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What connections without proof may take."""

    slots: int = 64
    slots_per_origin: int = 8
    seconds: float = 5.0


class Strangers:
    """The connections that have not proved themselves, in order of arrival."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._here: dict[Channel, tuple[str, float]] = {}

    def __iter__(self) -> Iterator[Channel]:
        return iter(list(self._here))

    def enter(self, channel: Channel, now: float) -> list[Channel]:
        """Gives a connection a slot; returns those that lose theirs: the oldest of its origin, else the oldest of all."""
        origin = origin_of(channel.peer)
        same = [other for other, (where, _) in self._here.items() if where == origin]
        gone = same[: max(0, len(same) - self._limits.slots_per_origin + 1)]
        if not gone and len(self._here) >= self._limits.slots:
            gone = [next(iter(self._here))]
        for other in gone:
            del self._here[other]
        self._here[channel] = (origin, now + self._limits.seconds)
        return gone

    def leave(self, channel: Channel) -> bool:
        """Frees a slot; whether the connection still had it."""
        return self._here.pop(channel, None) is not None

    def clear(self) -> None:
        self._here.clear()

    def overdue(self, now: float) -> list[Channel]:
        return [channel for channel, (_, until) in self._here.items() if until <= now]

    def next_deadline(self) -> float | None:
        for _, until in self._here.values():
            return until
        return None


class Complaints:
    """Logs warnings: `most` in `seconds`, because a flood of strangers must not become a flood of lines, and once in `again`
    seconds of the same subject, because who dials again and again has nothing new to say."""

    def __init__(self, most: int = 10, seconds: float = 60.0, again: float = 600.0) -> None:
        self._most = most
        self._seconds = seconds
        self._again = again
        self._told: dict[str, float] = {}
        """When subjects were last warned of; as few as there were lines."""
        self._since = -seconds
        self._said = 0
        self._kept = 0
        self._lock = threading.Lock()

    def say(self, text: str, subject: str = "", now: float | None = None) -> None:
        now = time.monotonic() if now is None else now
        with self._lock:
            if now - self._since >= self._seconds:
                self._since, self._said = now, 0
            self._told = {other: when for other, when in self._told.items() if now - when < self._again}
            if self._said >= self._most or subject in self._told:
                self._kept += 1
                return
            if subject:
                self._told[subject] = now
            self._said += 1
            more, self._kept = self._kept, 0
        log.warning("%s%s", text, f" ({more} more like this were not logged)" if more else "")


def origin_of(peer: str) -> str:
    """Whom a connection counts for: an IPv4 address, an IPv6 network (one owner has a whole /64), else the peer's text."""
    host = peer.rpartition(":")[0].strip("[]") or peer
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
