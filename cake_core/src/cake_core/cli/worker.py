"""`cake worker`: serves the layers a topology gives to a node."""

from __future__ import annotations

import platform
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cake_core.cli.app import current_app
from cake_core.cli.console import Bars, human_bytes, human_seconds, parse_size
from cake_core.cli.opening import loading, take_short_turns
from cake_core.cli.options import ModelFlags, model_options
from cake_core.cli.sections import SectionedCommand, option
from cake_core.errors import CakeError, ConfigError, NodeUnreachable

if TYPE_CHECKING:
    from cake_core.cluster.discovery import Announcement
    from cake_core.links.connect import Keyring
    from cake_core.plugins import Plugins
    from cake_core.security import Gate
    from cake_core.topology import Topology
    from cake_core.transport import Address
    from cake_core.worker.host import Again
    from cake_core.worker.worker import BareSpec, Worker, WorkerSpec

WORKER = "Worker"
REDIAL = (0.5, 5.0)
"""Seconds between attempts to join: doubling from the first to the last."""
ANYWHERE, HERE = "0.0.0.0:10128", "127.0.0.1:10128"
"""Where to listen: who waits for masters to come must be reached, and the key keeps everybody else out."""


@click.command(cls=SectionedCommand)
@option(WORKER, "--name", metavar="N", help="Name in the topology, or any.  [default: the only node's, or the host's]")
@option(WORKER, "--address", metavar="H:P", help="Where to listen.  [default: 0.0.0.0:10128, with layers of its own 127.0.0.1]")
@option(WORKER, "--join", metavar="H:P", help="Dial the master there (its --listen) instead of listening.")
@option(WORKER, "--drain", type=float, default=30, show_default=True, metavar="S", help="Seconds SIGTERM lets requests end.")
@option(WORKER, "--no-announce", is_flag=True, help="Do not make this worker known on the local network.")
@option(WORKER, "--cache-size", metavar="SIZE", help="Keep at most this much of earlier models' weights, as 50GB.")
@model_options("model", "topology", "load", "key", "image")
def worker(name: str | None, flags: ModelFlags, **given: Any) -> None:
    """Make this machine available, or serve the layers that a topology gives to it.

    Alone, it waits for a master to assign layers, and fetches their weights from it. With --topology, or with a folder made by
    `cake split-model` as --model, it loads its own.
    """
    from cake_core.cli.machine import prober
    from cake_core.links.connect import Connector
    from cake_core.warming import Warming
    from cake_core.worker.worker import Worker

    take_short_turns()
    plugins, keyring = current_app().plugins, flags.keyring()
    bare = flags.model is None and flags.topology is None
    spec = bare_spec(name, flags, given["cache_size"]) if bare else worker_spec(name, plugins, flags)
    door = Door(plugins, keyring, given["address"], given["join"], bare)
    served = Worker(plugins, spec, dial=Connector(plugins, keyring).dial)
    if bare:
        click.echo(f"worker {served.name!r} waits for a master to assign layers")
    else:
        door.check()
        load(served)
    served.profile = partial(prober(plugins, flags.load_options()).node, served.name)
    stop = Stop()
    door.open(served, stop, announced=bare and not given["no_announce"])
    # Who waits has nothing better to do, and the first question is answered seconds sooner.
    texts = [backend for backend in plugins.backends.values() if bare and backend.model_type == "text"]
    warming = Warming(texts, lambda seconds: stop.after(seconds) or served.serving is not None)
    stop.wait()
    click.echo("draining" if stop.gently else "stopping")
    door.close()
    served.shutdown(given["drain"] if stop.gently else 0.0)
    warming.wait()
    if not stop.gently:
        raise click.Abort


def bare_spec(name: str | None, flags: ModelFlags, cache_size: str | None) -> BareSpec:
    """A worker that masters assign layers to."""
    from cake_core.config import load_options
    from cake_core.weights.store import Store
    from cake_core.worker.tenant import Means
    from cake_core.worker.worker import BareSpec

    size = None if cache_size is None else parse_size(cache_size)
    store = Store(load_options().cache_dir / "weights")
    return BareSpec(name or platform.node() or "worker", Means(store, flags.load_options(), click.echo, size))


def worker_spec(name: str | None, plugins: Plugins, flags: ModelFlags) -> WorkerSpec:
    """A worker with layers of its own."""
    from cake_core.worker.worker import WorkerSpec

    topology = own_topology(flags)
    return WorkerSpec(flags.checkpoint(plugins), topology, own_name(name, topology), flags.load_options(), flags.kind)


class Door:
    """How masters come to this worker: it listens (and says so on the network), or it dials one."""

    def __init__(self, plugins: Plugins, keyring: Keyring, address: str | None, join: str | None, bare: bool) -> None:
        from cake_core.transport import Address

        self._plugins, self._keyring = plugins, keyring
        self._join = None if join is None else Address.parse(join)
        self._address = Address.parse(address or (ANYWHERE if bare else HERE))
        self._fixed = address is not None or not bare
        self._announcement: Announcement | None = None

    def check(self) -> None:
        """A port that is taken must be told before minutes of loading, but nobody is let in before they are over."""
        if self._join is None:
            self._plugins.transport(self._address.scheme).listen(self._address, None).close()

    def open(self, served: Worker, stop: Stop, announced: bool) -> None:
        if self._join is not None:
            from cake_core.links.connect import dial_master

            dial = partial(dial_master, self._plugins, self._keyring, self._join, served.name, 5.0)
            threading.Thread(target=keep_joined, args=(served, dial, self._join, stop), daemon=True).start()
            return
        gate = self._gate(served.name)
        threading.Thread(target=served.serve, args=(gate,), name="cake-serve", daemon=True).start()
        click.echo(f"listening on {gate.address}")
        if announced:
            from cake_core.cluster.discovery import announce

            self._announcement = announce(served.name, gate.address)

    def _gate(self, name: str) -> Gate:
        from cake_core.links.connect import open_gate

        try:
            return open_gate(self._plugins, self._keyring, self._address, name)
        except ConfigError:
            if self._fixed:
                raise
            # Another worker of this machine has the usual port; who looks for this one on the network learns any other.
            return open_gate(self._plugins, self._keyring, replace(self._address, port=0), name)

    def close(self) -> None:
        if self._announcement is not None:
            self._announcement.close()


def own_topology(flags: ModelFlags) -> Topology:
    """The topology given, else the one a bundle of `split-model` brings. Raises ConfigError when there is none."""
    if flags.topology is None and flags.model is not None:
        model = Path(flags.model)
        beside = [folder / "topology.yml" for folder in (model, model.parent)]
        found = next((path for path in beside if path.is_file()), None)
        if found is not None:
            return replace(flags, topology=found).load_topology()
    if flags.topology is None:
        raise ConfigError(
            "a worker needs to know its layers: give --topology, or as --model a folder made by `cake split-model`"
        )
    return flags.load_topology()


def own_name(name: str | None, topology: Topology) -> str:
    """The name given, checked, or that of the only node."""
    if name is not None:
        return topology.node(name).name
    if len(topology.nodes) == 1:
        return topology.nodes[0].name
    names = ", ".join(node.name for node in topology.nodes) or "none"
    raise ConfigError(f"which worker is this? give --name, one of: {names}")


def load(served: Worker) -> None:
    """Loads the layers and says what was loaded, where and how."""
    from cake_core.topology import compress

    start = time.monotonic()
    with Bars("loading") as bars:
        serving = served.load(loading(bars))
    held = [stage.memory() for stage in serving.stages] + [part.memory() for part in serving.components.values()]
    for layers, memory in zip(serving.spans, held, strict=True):
        click.echo(f"{', '.join(compress(layers))}: {human_bytes(memory.weights)} on {memory.device} as {memory.dtype}")
    total, took = sum(memory.weights for memory in held), human_seconds(time.monotonic() - start)
    click.echo(f"worker {served.name!r} loaded {human_bytes(total)} of {serving.info.name} in {took}")


class Stop:
    """Waits for a signal: SIGTERM asks for an orderly end, Ctrl-C for one at once (also while draining)."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.gently = False
        signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, *_: object) -> None:
        self.gently = True
        self._event.set()

    def wait(self) -> None:
        """Until a signal comes; to be called in the main thread."""
        try:
            # Windows does not wake a wait without a timeout for Ctrl-C.
            while not self.after(0.5):
                continue
        except KeyboardInterrupt:
            self._event.set()

    def after(self, seconds: float) -> bool:
        """Whether a signal came within this time."""
        return self._event.wait(seconds)


def keep_joined(served: Worker, dial: Again, master: Address, stop: Stop) -> None:
    """Dials the master, serves it, and dials again when the link has ended, until the process stops."""
    pause = REDIAL[0]
    told = ""
    while not stop.after(0):
        try:
            link = served.adopt(dial(b""), dial)
        except CakeError as error:
            why = str(error)
            if isinstance(error, NodeUnreachable):  # its remedy is for who looks for a worker
                why = f"{why.partition(';')[0]}; start the master there with --listen, and check the port"
            if why != told:
                click.echo(f"cannot join yet: {why}", err=True)
                told = why
            pause = min(2 * pause, REDIAL[1])
        else:
            click.echo(f"joined {master}")
            while link.up and not stop.after(0.2):
                continue
            pause, told = REDIAL[0], ""
        stop.after(pause)
