"""Real workers for a benchmark: processes of the command line on loopback, with a key and TLS, all ended at its end."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cake_core.links.connect import Connector, Keyring
from cake_core.plugins import Plugins
from cake_core.runtime import RunSpec
from cake_core.topology import load_topology


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def workers(
    plugins: Plugins, model: str, layers: Mapping[str, Sequence[str]], options: Sequence[str] = ()
) -> Iterator[RunSpec]:
    """Starts a worker for each node, with `options` of the command line; yields what to open a master over them with."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        keyring = Keyring(None, Path(folder), False, lambda key: None)  # noqa: ARG005
        keyring.key()
        path = Path(folder) / "topology.yaml"
        path.write_text("".join(_node(name, entries) for name, entries in layers.items()))
        env = {**os.environ, "CAKE_CONFIG_DIR": folder, "CAKE_CACHE_DIR": folder}
        topology = load_topology(path)
        for name in layers:
            address = str(topology.node(name).host).removeprefix("tcp://")
            command = [sys.executable, "-m", "cake_core", "worker", "--model", model, "--topology", str(path), "--name", name]
            process = subprocess.Popen([*command, "--address", address, *options], env=env, stdout=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        yield RunSpec(plugins.resolve(model), topology, dial=Connector(plugins, keyring).dial, wait=240.0)


def _node(name: str, entries: Sequence[str]) -> str:
    return f"{name}:\n  host: '127.0.0.1:{_free_port()}'\n  layers:\n" + "".join(f"    - {entry}\n" for entry in entries)
