"""Nodes that fail at a message of one's choice, over any transport, and the answers of a cluster of them."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tests.core.test_worker import wait_for

from cake_core.checkpoint import Checkpoint
from cake_core.errors import ChannelClosed, NodeUnreachable
from cake_core.links.link import LinkTiming
from cake_core.model import Buffer
from cake_core.plugins import Plugins
from cake_core.runtime import TextRuntime
from cake_core.testing.cluster import LocalCluster
from cake_core.testing.faults import Faults, FaultyChannel
from cake_core.transport import Address, Channel, Listener, Transport
from cake_core.wire.protocol import Type

Kind = Literal["killed", "frozen", "cut", "garbage"]
KINDS: tuple[Kind, ...] = ("killed", "frozen", "cut", "garbage")
QUICK = LinkTiming(heartbeat=0.05, dead=0.25, request=10.0)
"""A forty times shorter clock."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to `node` when batch number `index` is sent to it, or its own answer is sent (`answers`)."""

    kind: Kind
    node: str
    index: int
    answers: bool = False
    stays: bool = False
    """Whether a node that was killed or frozen stays so."""


class Saboteur:
    """Decides the fate of every message of a cluster. One fault at a time."""

    def __init__(self) -> None:
        self.fault: Fault | None = None
        self.gone: dict[str, Kind] = {}
        """Nodes that are killed or frozen now."""
        self.happened = threading.Event()
        self._lock = threading.Lock()
        self._seen = 0
        self._channels: list[SabotagedChannel] = []

    def arm(self, fault: Fault) -> None:
        with self._lock:
            self.fault, self._seen = fault, 0
            self.happened.clear()

    def heal(self) -> None:
        """Every node is there again."""
        self.gone.clear()

    def add(self, channel: SabotagedChannel) -> None:
        with self._lock:
            self._channels = [other for other in self._channels if not other.ended] + [channel]

    def due(self, channel: SabotagedChannel, header: bytes) -> Kind | None:
        """What happens to this message, if it is the one."""
        with self._lock:
            fault = self.fault
            if fault is None:
                return None
            wanted = channel.sender == fault.node if fault.answers else channel.receiver == fault.node
            if not wanted or header[0] not in (Type.FORWARD, Type.OUTPUT):
                return None
            self._seen += 1
            if self._seen <= fault.index:
                return None
            self.fault = None
        if fault.kind in ("killed", "frozen"):
            self.gone[fault.node] = fault.kind
        if fault.kind == "killed":
            self._abort(fault.node)
        if not fault.stays and fault.kind == "killed":
            del self.gone[fault.node]
        self.happened.set()
        return fault.kind

    def frozen(self, channel: SabotagedChannel) -> bool:
        return any(self.gone.get(end) == "frozen" for end in (channel.sender, channel.receiver))

    def _abort(self, node: str) -> None:
        with self._lock:
            channels = [one for one in self._channels if node in (one.sender, one.receiver)]
        for channel in channels:
            channel.abort()


class SabotagedChannel(FaultyChannel):
    """One end: what `sender` sends to `receiver`."""

    def __init__(self, inner: Channel, sender: str, receiver: str, saboteur: Saboteur) -> None:
        super().__init__(inner, Faults, lambda seconds: None)
        self.sender, self.receiver = sender, receiver
        self.ended = False
        self._saboteur = saboteur
        saboteur.add(self)

    def send(self, header: bytes, buffers: Sequence[Buffer] = (), timeout: float | None = None) -> None:
        kind = self._saboteur.due(self, header)
        if kind == "cut":
            self.abort()
        if kind in ("killed", "cut"):
            raise ChannelClosed(f"{self.sender} and {self.receiver} have lost one another")
        if self._saboteur.frozen(self):
            return  # nobody reads it, and nobody says so
        if kind == "garbage":
            header, buffers = random.Random(len(header)).randbytes(40), ()
        super().send(header, buffers, timeout)

    def close(self) -> None:
        self.ended = True
        super().close()

    def abort(self) -> None:
        self.ended = True
        super().abort()


class SabotagedListener(Listener):
    def __init__(self, inner: Listener, node: str, saboteur: Saboteur) -> None:
        self.address = inner.address
        self._inner, self._node, self._saboteur = inner, node, saboteur

    def accept(self, timeout: float | None = None) -> Channel:
        return SabotagedChannel(self._inner.accept(timeout), self._node, "who dialled", self._saboteur)

    def close(self) -> None:
        self._inner.close()


class FaultyCluster(LocalCluster):
    """A LocalCluster whose nodes a saboteur may kill, freeze, cut off or have talk nonsense."""

    def __init__(
        self, checkpoint: Checkpoint, transport: Transport, layers: Mapping[str, Sequence[str]], timing: LinkTiming = QUICK
    ) -> None:
        self.saboteur = Saboteur()
        super().__init__(Plugins(entries=()), checkpoint, transport, layers, timing=timing)

    def _listen(self, name: str, address: Address | None = None) -> Listener:
        return SabotagedListener(super()._listen(name, address), name, self.saboteur)

    def dial(self, address: Address, timeout: float) -> Channel:
        return self._dialled("master", address, timeout)

    def dial_peer(self, name: str, address: Address, timeout: float) -> Channel:
        return self._dialled(name, address, timeout)

    def _dialled(self, sender: str, address: Address, timeout: float) -> Channel:
        node = next(name for name, other in self.addresses.items() if other == address)
        for end in (sender, node):
            if end in self.saboteur.gone:
                raise NodeUnreachable(f"{end} is {self.saboteur.gone[end]}", node, str(address))
        return SabotagedChannel(self.transport.dial(address, None, timeout), sender, node, self.saboteur)

    def check_nothing_is_left(self, runtime: TextRuntime) -> None:
        """Every session is closed and every block of the ledger free, once nothing runs and no prefix is kept."""
        wait_for(lambda: not runtime.engine.stats().running)
        wait_for(lambda: all(worker.sessions == worker.parked == 0 for worker in self.workers.values()))
        assert runtime.engine.stats().kv_tokens_used == 0
