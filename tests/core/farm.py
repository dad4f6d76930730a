"""Bare workers in threads over one in-memory network, and masters that assign to them."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cake_core.assignment import Assignment
from cake_core.bundle import layer_files
from cake_core.checkpoint import Checkpoint
from cake_core.cluster.assigner import NodeAssigner
from cake_core.cluster.expectation import Expectation
from cake_core.cluster.node import RemoteNode
from cake_core.errors import ProtocolError
from cake_core.links.link import Handler, Link
from cake_core.model import LoadOptions, ModelInfo
from cake_core.plugins import Plugins
from cake_core.profiles import DeviceProfile, NodeProfile
from cake_core.testing.cluster import FAST, LocalCluster, OpenGate
from cake_core.testing.memory import MemoryTransport
from cake_core.testing.toys import ToyTextBackend
from cake_core.transport import Address, Channel
from cake_core.weights.store import Store
from cake_core.weights.supply import ImageSupply
from cake_core.wire.protocol import Message
from cake_core.worker.tenant import Means
from cake_core.worker.worker import BareSpec, Worker


def describe(model: Checkpoint) -> ModelInfo:
    return ToyTextBackend().describe(model, LoadOptions())


class Farm:
    """Bare workers in threads over one in-memory network, and masters that assign to them."""

    def __init__(self, folder: Path) -> None:
        self.transport = MemoryTransport()
        self.plugins = Plugins(entries=())
        self.folder = folder
        self._ends = ExitStack()
        self._listeners: dict[str, Any] = {}
        self.workers: dict[str, Worker] = {}

    def dial(self, address: Address, timeout: float) -> Channel:
        return self.transport.dial(address, None, timeout)

    def start(self, name: str, home: str = "", memory: int = 1 << 30) -> Worker:
        """A worker, at the address of the one of this name that was ended."""
        means = Means(Store(self.folder / (home or name)))
        worker = Worker(self.plugins, BareSpec(name, means), FAST, self.dial)
        worker.profile = lambda _backend: NodeProfile(name, (DeviceProfile("cpu", memory, 1e10),))
        former = self._listeners.get(name)
        listener = self.transport.listen(Address(name, 0, "memory") if former is None else former.address, None)
        thread = threading.Thread(target=worker.serve, args=(OpenGate(listener),), daemon=True)
        thread.start()
        self._listeners[name], self.workers[name] = listener, worker
        self._ends.callback(worker.shutdown)
        return worker

    def end(self, name: str) -> None:
        """Ends a worker at once; nobody answers at its address any more."""
        self.workers.pop(name).shutdown()
        self._listeners[name].close()

    def address(self, name: str) -> Address:
        return self._listeners[name].address

    def node(
        self, name: str, model: Checkpoint, layers: tuple[str, ...], sources: tuple[Address, ...] = (), who: str = "desk"
    ) -> RemoteNode:
        """A master's way to the worker; not yet connected."""
        info = describe(model)
        supply = ImageSupply()
        files = supply.offer(layer_files(model, info, layers))
        assignment = Assignment(who, model.name, "text", (layers,), LoadOptions(), files, sources)
        address = self.address(name)
        assigner = NodeAssigner(name, lambda: assignment, supply, lambda _, timeout: self.dial(address, timeout), timing=FAST)
        fingerprints = {layer: model.fingerprint(info.layer(layer).tensors)[:32] for layer in layers}
        expectation = Expectation("text", (layers,), info.identity, fingerprints)
        node = RemoteNode(
            name, str(address), lambda timeout: self.dial(address, timeout), expectation, lambda _: None, FAST, assigner
        )
        self._ends.callback(node.close)
        node.start()
        return node

    def link(self, name: str, cluster: LocalCluster | None = None, handler: Handler | None = None) -> Link:
        """A bare link to a worker."""
        channel = self.dial(self.address(name), 5) if cluster is None else cluster.dial(cluster.addresses[name], 5)
        link = Link(channel, name, handler or refuse, lambda link, error: None, FAST)
        link.start()
        self._ends.callback(link.close)
        return link

    def close(self) -> None:
        self._ends.close()


def refuse(link: Link, message: Message, body: memoryview) -> None:
    raise ProtocolError(f"unexpected {message.type.name}")
