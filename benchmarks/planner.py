"""Predicted against measured: workers in processes of their own behind slowed links, cuts that nobody tuned for.

    python benchmarks/planner.py --model random:smollm2-135m

Every node measures itself and the links are surveyed as `cake topology plan` does; then each cut is predicted, run with
`cake bench text`, and compared. The plan for the same profiles is run too, beside the best of the
cuts. With `--threads 1 --kernels scalar` the master is slow, so that a cluster may be worth while.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from relay import relay_tcp

from cake_core.cluster.gathering import cluster_profile
from cake_core.cluster.probing import Prober
from cake_core.cluster.survey import Surveyed, survey
from cake_core.links.connect import Connector, Keyring
from cake_core.model import LoadOptions
from cake_core.placement import Placement, place
from cake_core.planners import PlanRequest, plan, predict
from cake_core.plugins import Plugins
from cake_core.profiles import ClusterProfile
from cake_core.split import topology_text
from cake_core.topology import MASTER, Node, Topology, compress, expand
from cake_core.transport import Address

NODES = {"near": (2, 0.0003), "slow": (1, 0.0003), "far": (2, 0.004)}
"""Threads and one-way delay of each worker."""
PROMPT, TOKENS, RUNS = 64, 64, 3


def cuts(blocks: int) -> list[dict[str, list[str]]]:
    """Which layers go where; the rest stays on the master."""

    def span(start: float, stop: float) -> str:
        return f"model.layers.{round(start * blocks)}-{round(stop * blocks) - 1}"

    head = ["model.norm", "lm_head"]
    return [
        {},
        {"near": [span(0, 0.5)]},
        {"slow": [span(0.3, 1)]},
        {"near": [span(0, 1), *head]},
        {"far": ["model.embed_tokens", span(0, 1), *head]},
        {"near": [span(0, 0.4)], "slow": [span(0.4, 0.6)]},
        {"slow": [span(0.1, 0.3)], "far": [span(0.5, 1), *head]},
        {"near": [span(0, 0.2)], "slow": [span(0.2, 0.5)], "far": [span(0.5, 0.9)]},
    ]


class Rig:
    """Starts workers for a topology, measures through the command line, and ends what it started."""

    def __init__(self, model: str, folder: Path, threads: int, kernels: str) -> None:
        self.model, self.folder = model, folder
        if kernels:
            os.environ["CAKE_KERNELS"] = kernels  # this process measures for the master
        self.threads = {MASTER: threads, **{name: count for name, (count, _) in NODES.items()}}
        self.ports = {name: _free_port() for name in NODES}
        self.relays = {name: relay_tcp(self.ports[name], delay, 0.0) for name, (_, delay) in NODES.items()}

    def env(self, name: str) -> dict[str, str]:
        """Each node has a cache of its own, so that each measures itself."""
        environ = {key: value for key, value in os.environ.items() if name == MASTER or key != "CAKE_KERNELS"}
        return {**environ, "CAKE_CACHE_DIR": str(self.folder / name), "CAKE_CONFIG_DIR": str(self.folder / "config")}

    def topology(self, cut: dict[str, list[str]]) -> Topology:
        return Topology(
            tuple(
                Node(name, Address.parse(f"127.0.0.1:{self.relays[name]}"), tuple(layer for e in layers for layer in expand(e)))
                for name, layers in cut.items()
            )
        )

    def start(self, topology: Topology) -> list[subprocess.Popen[str]]:
        file = self.folder / "topology.yml"
        file.write_text(topology_text(topology.nodes))
        workers = [
            subprocess.Popen(
                [*CAKE, "worker", "--name", node.name, "--topology", str(file), "--model", self.model, "--insecure",
                 "--device", "cpu", "--threads", str(self.threads[node.name]),
                 "--address", f"127.0.0.1:{self.ports[node.name]}"],
                env=self.env(node.name), stdout=subprocess.PIPE, text=True,
            )
            for node in topology.nodes
        ]  # fmt: skip
        for worker in workers:  # a relay needs somebody behind it
            assert worker.stdout is not None
            if not any(line.startswith("listening") for line in worker.stdout):
                raise SystemExit("a worker did not start")
        return workers

    def measure(self, way: Placement) -> float:
        """Seconds a token."""
        nodes = {name: list(way.layers_of(name)) for name in way.nodes if name != MASTER}
        topology = self.topology(nodes)
        workers = self.start(topology)
        try:
            done = subprocess.run(
                [*CAKE, "bench", "text", "--model", self.model, "--topology", str(self.folder / "topology.yml"), "--insecure",
                 "--device", "cpu", "--threads", str(self.threads[MASTER]), "--wait", "120", "--route", "star",
                 "--workers", "none", "--json", "--prompt-tokens", str(PROMPT), "--tokens", str(TOKENS), "--runs", str(RUNS)],
                env=self.env(MASTER), check=True, stdout=subprocess.PIPE,
            )  # fmt: skip
            return float(json.loads(done.stdout)["time_per_token"]["median"])
        finally:
            _end(workers)

    def profiles(self, plugins: Plugins, backend: str) -> ClusterProfile:
        """One node after the other, so that none takes the other's time."""
        workers = self.start(self.topology({name: [f"model.layers.{index}"] for index, name in enumerate(NODES)}))
        connector = Connector(plugins, Keyring(None, self.folder / "config", True, print))
        try:
            found = [self._surveyed(connector, name, backend) for name in NODES]
        finally:
            _end(workers)
        prober = Prober(plugins, LoadOptions(device="cpu", threads=self.threads[MASTER]), self.folder / MASTER, _nothing)
        return cluster_profile(prober.node(MASTER, backend), found)

    def _surveyed(self, connector: Connector, name: str, backend: str) -> Surveyed:
        address = Address.parse(f"127.0.0.1:{self.relays[name]}")
        return survey(connector.dial(address, 5), address, backend=backend)


CAKE = [sys.executable, "-m", "cake_core"]


def _nothing() -> object:
    raise SystemExit("the backend of this model does not measure")


def _end(workers: list[subprocess.Popen[str]]) -> None:
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="random:smollm2-135m")
    parser.add_argument("--threads", type=int, default=2, help="of the master")
    parser.add_argument("--kernels", default="", help="of the master: with `scalar` it is slow")
    parser.add_argument("--rounds", type=int, default=2, help="of all cuts, one after the other: processes differ")
    given = parser.parse_args()
    plugins = Plugins()
    checkpoint = plugins.resolve(given.model)
    backend = plugins.backend_for(checkpoint, "text")
    info = backend.describe(checkpoint, LoadOptions(device="cpu"))
    blocks = sum(bool(layer.kv_bytes_per_token) for layer in info.layers)
    ask = PlanRequest(context=512, position=PROMPT + TOKENS // 2)
    with tempfile.TemporaryDirectory() as folder:
        rig = Rig(given.model, Path(folder), given.threads, given.kernels)
        cluster = rig.profiles(plugins, backend.name)
        print(json.dumps(cluster.as_fields()), file=sys.stderr)
        chosen = place(info, plan(info, cluster, ask).topology)
        ways = [place(info, rig.topology(cut)) for cut in cuts(blocks)]
        ways += [] if chosen in ways else [chosen]
        guesses = [predict(info, way, cluster, ask).seconds_per_token for way in ways]
        rounds = [[rig.measure(way) for way in ways] for _ in range(given.rounds)]
    report(ways, guesses, list(zip(*rounds, strict=True)), ways.index(chosen))


def report(ways: list[Placement], guesses: list[float], measured: list[tuple[float, ...]], chosen: int) -> None:
    """A row for each way, the plan's marked; the error over those that nobody chose; what following the plan costs."""
    times = [statistics.median(each) for each in measured]
    errors = [guess / seconds - 1 for guess, seconds in zip(guesses, times, strict=True)]
    for index, (way, guess, seconds, error) in enumerate(zip(ways, guesses, times, errors, strict=True)):
        words = "; ".join(f"{span.node} {', '.join(compress(span.layers))}" for span in way.spans if span.node != MASTER)
        words = (words or "the master alone") + (" (the plan)" if index == chosen else "")
        every = ", ".join(f"{one * 1e3:.2f}" for one in measured[index])
        print(f"| {words} | {guess * 1e3:.2f} | {seconds * 1e3:.2f} ({every}) | {error * 100:+.0f} % |")
    off = [abs(error) for error in errors]
    print(f"error: median {statistics.median(off) * 100:.0f} %, worst {max(off) * 100:.0f} %")
    print(f"the plan beside the best measured: {(times[chosen] / min(times) - 1) * 100:+.0f} %")
    planned, seen = guesses[chosen] < guesses[0], times[chosen] < times[0]
    wrong = 0.0 if planned == seen or not chosen else abs(times[chosen] / times[0] - 1)
    words = "workers" if planned else "the master alone"
    gain = (1 - times[chosen] / times[0]) * 100
    print(f"planned: {words}; the plan takes {gain:.0f} % less than the master alone; wrong by {wrong * 100:.0f} %")


if __name__ == "__main__":
    main()
