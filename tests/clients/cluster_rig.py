"""`cake serve` in front of workers, as processes of this machine with a folder for their home."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tests.e2e.conftest import PATIENCE, Process

CAKE = [sys.executable, "-m", "cake_core"]


@dataclass(frozen=True)
class Cluster:
    """A cluster that is ready. `url` has no path."""

    url: str
    master: Process
    workers: Sequence[Process]

    def view(self) -> Any:
        return httpx.get(f"{self.url}/api/v1/cluster", timeout=30).json()

    def idle(self, seconds: float) -> bool:
        """Whether nothing is being generated any more, or soon will not be."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            view = self.view()
            if view["requests"] == view["engine"]["running"] == view["engine"]["waiting"] == 0:
                return True
            time.sleep(0.05)
        return False


@contextlib.contextmanager
def cluster(folder: Path, *options: str, cuts: Sequence[str] = ()) -> Iterator[Cluster]:
    """A worker for the layers of each of `cuts`, and a server; all of them are gone at the end. `options` before a `--` are
    for both, those after it for the server."""
    folder.mkdir(parents=True, exist_ok=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("CAKE_", "HF_"))}
    env |= {"CAKE_CONFIG_DIR": str(folder), "CAKE_CACHE_DIR": str(folder), "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    env |= {"CAKE_CLUSTER_KEY": secrets.token_hex(32), "PYTHONWARNINGS": "ignore"}
    addresses = [_free_address() for _ in cuts]
    entries = [f"w{i}:\n  host: '{at}'\n  layers: [{cut}]\n" for i, (at, cut) in enumerate(zip(addresses, cuts, strict=True))]
    (folder / "topology.yml").write_text("".join(entries))
    more = ["--topology", "topology.yml"] if cuts else []
    model = list(options[: options.index("--") if "--" in options else len(options)])
    serve = list(options[len(model) + 1 :])
    processes: list[Process] = []
    try:
        for index, address in enumerate(addresses):
            worker = [*CAKE, "worker", *model, *more, "--name", f"w{index}", "--address", address]
            processes.append(Process(worker, env, folder))
        master = Process([*CAKE, "serve", *model, *more, "--api", "127.0.0.1:0", *serve], env, folder)
        processes.append(master)
        found = re.search(r"listening on (http://\S+)", master.wait_for("listening on http"))
        assert found is not None
        _until_ready(found[1], processes)
        yield Cluster(found[1], master, processes[:-1])
    finally:
        for process in reversed(processes):
            process.end()


def _until_ready(url: str, processes: Sequence[Process]) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        for process in processes:
            assert process.popen.poll() is None, process.output[-4000:]
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=30).status_code == 200:
                return
        time.sleep(0.1)
    raise TimeoutError("\n".join(process.output[-2000:] for process in processes))


def _free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"
