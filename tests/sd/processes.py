"""Workers as processes of their own, and masters in this one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.links.connect import Connector, Keyring
from cake_core.model import LoadOptions
from cake_core.plugins import Plugins
from cake_core.runtime import ImageRuntime, RunSpec, open_image
from cake_core.topology import parse_topology
from cake_sd import hooks

PATIENCE = 90.0


def plugins_over_tcp() -> Plugins:
    from cake_transport_tcp import hooks as tcp

    plugins = Plugins(entries=())
    plugins.register("sd", hooks)
    plugins.register("tcp", tcp)
    return plugins


class Worker:
    """`cake worker` in a process of its own: `layer` of `folder`, what a bundle says when no layer is named, or without a
    folder whatever masters assign."""

    def __init__(self, home: Path, name: str, folder: Path | None = None, layer: str = "") -> None:
        self.name, self.layer = name, layer
        command = [sys.executable, "-m", "cake_core", "worker", "--device", "cpu", "--name", name]
        command += ["--address", "127.0.0.1:0", "--insecure", "--no-announce"]
        if folder is not None:
            command += ["--model", str(folder), "--model-type", "image", "--dtype", "f32"]
        if layer:
            topology = home / f"{name}.yml"
            topology.write_text(f"{name}:\n  host: 127.0.0.1:1\n  layers: [{layer}]\n")
            command += ["--topology", str(topology)]
        environment = {**os.environ, "CAKE_PLUGINS": "sd,tcp", "OMP_NUM_THREADS": "1", "CAKE_CONFIG_DIR": str(home)}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._ready = threading.Event()
        self._output: list[str] = []
        self._port = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self._output.append(line)
            if found := re.search(r"listening on tcp://127\.0\.0\.1:(\d+)", line):
                self._port = int(found[1])
                self._ready.set()
        self._ready.set()

    @property
    def port(self) -> int:
        assert self._ready.wait(PATIENCE), "the worker did not start"
        assert self._port, "".join(self._output)
        return self._port

    def end(self, how: int = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(10)
        if self.process.stdout:
            self.process.stdout.close()


@contextmanager
def master(folder: Path, entries: dict[str, Any], dtype: str = "f32", **extra: Any) -> Iterator[ImageRuntime]:
    plugins = plugins_over_tcp()
    keyring = Keyring(None, folder, True, lambda _key: None)
    options = LoadOptions(dtype=dtype, device="cpu", extra=extra)
    dial = Connector(plugins, keyring).dial
    spec = RunSpec(DiffusersCheckpoint(folder), parse_topology(entries), options, dial, wait=30.0)
    runtime = open_image(plugins, spec)
    try:
        yield runtime
    finally:
        runtime.close()
