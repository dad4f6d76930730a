"""A whole cluster in one process: workers in threads over any transport, for tests, docs and trying out a plugin.

::

    with LocalCluster(plugins, checkpoint, transport, {"w0": ["model.layers.0-1"], "w1": ["model.layers.2-3"]}) as cluster:
        runtime = cluster.open_text()
        events = list(runtime.engine.generate(TextRequest(prompt)))
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from cake_core.checkpoint import Checkpoint
from cake_core.errors import ConfigError
from cake_core.links.link import LinkTiming
from cake_core.model import LoadOptions
from cake_core.plugins import Plugins
from cake_core.runtime import ImageRuntime, RunSpec, TextRuntime, open_image, open_text
from cake_core.topology import Topology, parse_topology
from cake_core.transport import Address, Channel, Listener, Transport
from cake_core.worker.worker import Worker, WorkerSpec

FAST = LinkTiming(heartbeat=0.2, dead=1.0, request=30.0)
"""A ten times shorter clock, for tests of failures."""


class OpenGate:
    """Lets everybody through: what `security.Gate` is without a key. For clusters inside one process only."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def accept(self) -> tuple[Channel, bytes]:
        return self._listener.accept(), b""

    def close(self) -> None:
        self._listener.close()


class LocalCluster:
    """Workers in threads of this process. `layers` maps a worker's name to entries as in a topology file."""

    def __init__(
        self,
        plugins: Plugins,
        checkpoint: Checkpoint,
        transport: Transport,
        layers: Mapping[str, Sequence[str]],
        options: LoadOptions | None = None,
        timing: LinkTiming = FAST,
    ) -> None:
        self.plugins = plugins
        self.checkpoint = checkpoint
        self.transport = transport
        self.options = options or LoadOptions()
        self.timing = timing
        self.workers: dict[str, Worker] = {}
        self._layers = layers
        self._threads: list[threading.Thread] = []
        self._runtimes: list[TextRuntime | ImageRuntime] = []
        self._listeners = {name: self._listen(name) for name in layers}
        self.addresses = {name: listener.address for name, listener in self._listeners.items()}
        self.topology = self._topology()
        for name in layers:
            self.start(name)

    def _listen(self, name: str, address: Address | None = None) -> Listener:
        scheme = self.transport.scheme
        chosen = address or Address(name if scheme == "memory" else "127.0.0.1", 0, scheme)
        return self.transport.listen(chosen, None)

    def listen_again(self, name: str) -> Listener:
        """At the address of before, which a transport may hold a moment longer than the worker that was stopped."""
        until = time.monotonic() + 10.0
        while True:
            try:
                return self._listen(name, self.addresses[name])
            except ConfigError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)

    def _topology(self) -> Topology:
        entries = {name: {"host": str(self.addresses[name]), "layers": list(self._layers[name])} for name in self._layers}
        return parse_topology(entries, "the test's topology")

    def start(self, name: str, checkpoint: Checkpoint | None = None, options: LoadOptions | None = None) -> Worker:
        """Starts (again) the worker `name`, at the same address as before."""
        spec = WorkerSpec(checkpoint or self.checkpoint, self.topology, name, options or self.options)
        worker = Worker(self.plugins, spec, self.timing, partial(self.dial_peer, name))
        worker.load()
        listener = self._listeners.pop(name, None) or self.listen_again(name)
        self.workers[name] = worker
        thread = threading.Thread(target=worker.serve, args=(OpenGate(listener),), name=f"worker-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()
        return worker

    def stop(self, name: str) -> None:
        """Ends a worker at once: its links fall, its sessions are gone."""
        self.workers.pop(name).shutdown()

    def dial(self, address: Address, timeout: float) -> Channel:
        return self.transport.dial(address, None, timeout)

    def dial_peer(self, name: str, address: Address, timeout: float) -> Channel:
        """How the worker `name` reaches the next one of a chain."""
        return self.transport.dial(address, None, timeout)

    def spec(self, **changes: Any) -> RunSpec:
        values = {"options": self.options, "dial": self.dial, "timing": self.timing, "rejoin": 5.0, **changes}
        return RunSpec(self.checkpoint, values.pop("topology", self.topology), **values)

    def open_text(self, **changes: Any) -> TextRuntime:
        """A master over the cluster; closed with it. `changes` replace fields of its RunSpec."""
        runtime = open_text(self.plugins, self.spec(**changes))
        self._runtimes.append(runtime)
        return runtime

    def open_image(self, **changes: Any) -> ImageRuntime:
        runtime = open_image(self.plugins, self.spec(**changes))
        self._runtimes.append(runtime)
        return runtime

    def close(self) -> None:
        for runtime in self._runtimes:
            runtime.close()
        for worker in list(self.workers.values()):
            worker.shutdown()
        for listener in self._listeners.values():
            listener.close()
        for thread in self._threads:
            thread.join(10.0)

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
