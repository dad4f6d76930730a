"""`cake worker`: serves the layers a topology gives to a node."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cake_core.cli.app import current_app
from cake_core.cli.console import Bars, human_bytes, human_seconds
from cake_core.cli.opening import loading
from cake_core.cli.options import ModelFlags, model_options
from cake_core.cli.sections import SectionedCommand, option
from cake_core.errors import CakeError, ConfigError

if TYPE_CHECKING:
    from cake_core.connect import Keyring
    from cake_core.plugins import Plugins
    from cake_core.topology import Topology
    from cake_core.transport import Address
    from cake_core.worker import Worker

WORKER = "Worker"
REDIAL = (0.5, 5.0)
"""Seconds between attempts to join: doubling from the first to the last."""


@click.command(cls=SectionedCommand)
@option(WORKER, "--name", metavar="N", help="Name in the topology; may be left out when it has one node.")
@option(WORKER, "--address", default="127.0.0.1:10128", show_default=True, metavar="H:P", help="Where to listen.")
@option(WORKER, "--join", metavar="H:P", help="Dial the master there (its --listen) instead of listening.")
@option(WORKER, "--drain", type=float, default=30, show_default=True, metavar="S", help="Seconds SIGTERM lets requests end.")
@model_options("model", "topology", "load", "key", "image")
def worker(name: str | None, address: str, join: str | None, drain: float, flags: ModelFlags) -> None:
    """Serve the layers that the topology gives to this node.

    A folder made by `cake split-model` brings its own topology: --model is enough.
    """
    from cake_core.connect import Connector, open_gate
    from cake_core.transport import Address
    from cake_core.worker import Worker, WorkerSpec

    plugins = current_app().plugins
    topology = own_topology(flags)
    spec = WorkerSpec(flags.checkpoint(plugins), topology, own_name(name, topology), flags.load_options(), flags.kind)
    where, keyring = Address.parse(join or address), flags.keyring()
    served = Worker(plugins, spec, dial=Connector(plugins, keyring).dial)
    if join is None:
        # A port that is taken must be told before minutes of loading, but nobody is let in before they are over.
        plugins.transport(where.scheme).listen(where, None).close()
    load(served)
    stop = Stop()
    if join is not None:
        threading.Thread(target=keep_joined, args=(served, plugins, keyring, where, stop), daemon=True).start()
    else:
        gate = open_gate(plugins, keyring, where, served.name)
        threading.Thread(target=served.serve, args=(gate,), name="cake-serve", daemon=True).start()
        click.echo(f"listening on {gate.address}")
    stop.wait()
    click.echo("draining" if stop.gently else "stopping")
    served.shutdown(drain if stop.gently else 0.0)
    if not stop.gently:
        raise click.Abort


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


def keep_joined(served: Worker, plugins: Plugins, keyring: Keyring, master: Address, stop: Stop) -> None:
    """Dials the master, serves it, and dials again when the link has ended, until the process stops."""
    from cake_core.connect import dial_master

    pause = REDIAL[0]
    told = ""
    while not stop.after(0):
        try:
            link = served.adopt(dial_master(plugins, keyring, master, served.name, timeout=5.0))
        except CakeError as error:
            if str(error) != told:
                click.echo(f"cannot join yet: {error}", err=True)
                told = str(error)
            pause = min(2 * pause, REDIAL[1])
        else:
            click.echo(f"joined {master}")
            while link.up and not stop.after(0.2):
                continue
            pause, told = REDIAL[0], ""
        stop.after(pause)
