"""What a master learns of a worker before it plans: what was measured there, what it serves now, how far away it is."""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cake_core.caches import LITTLE, sweep
from cake_core.errors import CakeError, ConfigError, NodeError, NodeUnreachable, ProtocolError
from cake_core.links.link import Link, LinkTiming
from cake_core.profiles import LinkProfile, NodeProfile
from cake_core.transport import Address, Channel
from cake_core.wire.protocol import Message, Type

log = logging.getLogger(__name__)

ANSWER = 10.0
MEASURE = 60.0
"""Seconds a worker may take to measure itself, which it does once."""
ROUND_TRIPS, BODY = 7, 2048
"""How often a round trip is measured, and a hidden state in bytes."""
FIRST, LARGEST, ENOUGH = 64 << 10, 8 << 20, 0.05
"""Bytes of the first and the largest message that measure the rate; `ENOUGH` seconds of sending say it well."""

_SWEEPING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Surveyed:
    """A worker. `address` None: it dialled. `report` is its REPORT, `profile` None where it was never measured."""

    name: str
    address: Address | None
    link: LinkProfile
    report: Mapping[str, Any] = field(default_factory=dict)
    profile: NodeProfile | None = None

    @property
    def bare(self) -> bool:
        """Whether it waits for layers to be assigned."""
        return self.report.get("bare") is True

    @property
    def model(self) -> str:
        """The model it has layers of, if any."""
        return str(self.report.get("model", ""))

    @property
    def held_by(self) -> tuple[str, ...]:
        """The masters that use it now."""
        held = self.report.get("held_by", [])
        return tuple(str(name) for name in held) if isinstance(held, list) else ()


def survey(channel: Channel, address: Address | None, timing: LinkTiming | None = None, backend: str = "") -> Surveyed:
    """Asks and measures over a channel of its own, which it ends. `backend`: whose models the worker is to measure itself for.

    Raises NodeError or TransportError.
    """
    link = Link(channel, f"worker at {channel.peer}", _refuse, _ended, timing)
    link.start()
    try:
        report = _ask(link, Type.STATUS, {}, ANSWER).fields["report"]
        way = measure(link)
        return Surveyed(str(report.get("name", ""))[:100], address, way, report, _profile(link, backend))
    finally:
        link.close()
        link.join()


def _ask(link: Link, kind: Type, fields: Mapping[str, Any], timeout: float, body: bytes = b"") -> Message:
    try:
        return link.ask(kind, fields, buffers=[body] if body else ()).result(timeout)[0]
    except TimeoutError:
        raise NodeUnreachable(f"{link.name} does not answer {kind.name}; restart it") from None


def _profile(link: Link, backend: str) -> NodeProfile | None:
    try:
        fields = _ask(link, Type.PROFILE, {"backend": backend}, MEASURE).fields["profile"]
        return NodeProfile.from_fields(fields, f"the profile of {link.name}")
    except (ConfigError, NodeError) as error:
        log.warning("%s", error)
    except CakeError as error:
        if not link.up:
            raise
        log.info("%s: %s", link.name, error)  # a worker that nobody measured
    return None


def measure(link: Link) -> LinkProfile:
    """The link as a decode step finds it, coming upon caches that weights have gone through at both ends. One link at a time,
    as sweeping holds up every thread of this process."""
    rate = _rate(link)
    with _SWEEPING:
        clear, taken = sweep(LITTLE), []
        for _ in range(ROUND_TRIPS):
            _ask(link, Type.PROBE, {"tensors": [], "sweep": True}, ANSWER)
            clear()
            taken.append(_probe(link, BODY))
    seconds = statistics.median(taken)
    return LinkProfile(max(seconds / 2, seconds - BODY / rate), rate)  # a rate from a bad moment makes no link free


def _probe(link: Link, nbytes: int) -> float:
    """Seconds until the worker has taken that many bytes and said so."""
    body = bytes(nbytes)
    began = time.perf_counter()
    _ask(link, Type.PROBE, {"tensors": [["data", "u8", [nbytes]]] if nbytes else []}, ANSWER, body)
    return time.perf_counter() - began


def _rate(link: Link) -> float:
    """Bytes/s of large messages, by messages that grow until one takes long enough to be measured."""
    nbytes, empty = FIRST, _probe(link, 0)
    while True:
        seconds = max(_probe(link, nbytes) - empty, 1e-6)
        if seconds >= ENOUGH or nbytes >= LARGEST:
            return nbytes / seconds
        nbytes = min(LARGEST, nbytes * 4)


def measured(do: Callable[[], Surveyed]) -> Surveyed | CakeError:
    """The result, or why there is none: for many workers at once."""
    try:
        return do()
    except CakeError as error:
        return error


def _refuse(link: Link, message: Message, _body: memoryview) -> None:
    raise ProtocolError(f"{link.name} has no {message.type.name} to ask here")


def _ended(link: Link, error: CakeError) -> None:
    log.debug("%s: %s", link.name, error)
