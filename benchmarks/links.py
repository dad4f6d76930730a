"""Decode steps and prompts over four nodes on shaped links, against what stages and wires allow.

    python benchmarks/links.py

The stages take exactly their time (`sleeping.py`) and the links carry 8 KiB a position, as an 8B model in bf16 would have it;
engine, protocol and workers are the real ones, threads of one process over loopback TCP. Workers hand over to one another, so
a token takes one hop more than there are nodes. The floor of a decode step is the time of all stages, and for each hop a
latency and its bytes; that of a prompt is the larger of all stages' time and the time its bytes take over one wire.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

from shaped import Shape, ShapedTransport
from sleeping import LAYERS, SleepingCheckpoint, Speed, sleeping_plugins

from cake_core.events import TokenEvent
from cake_core.links.link import LinkTiming
from cake_core.requests import SamplingParams, TextRequest
from cake_core.runtime import TextRuntime
from cake_core.testing.cluster import LocalCluster
from cake_transport_tcp.transport import TcpTransport

HIDDEN = 8192
SPEED = Speed(fixed=0.020, each=0.0002, hidden=HIDDEN)
LINKS = {
    "loopback": Shape(0.0),
    "1 Gbit/s, 0.25 ms": Shape(0.00025, 125e6),
    "20 MB/s, 2 ms": Shape(0.002, 20e6),
    "1 Gbit/s, 10 ms": Shape(0.010, 125e6),
}


@dataclass(frozen=True, slots=True)
class Measured:
    first: float
    token: float


def cut(nodes: int) -> dict[str, list[str]]:
    each = LAYERS // nodes
    return {f"w{i}": [f"model.layers.{i * each}-{(i + 1) * each - 1}"] for i in range(nodes)}


def measure(runtime: TextRuntime, prompt: int, tokens: int, rounds: int) -> Measured:
    firsts, gaps = [], []
    for salt in range(rounds):
        request = TextRequest(
            (salt, *[i % 250 for i in range(1, prompt)]), SamplingParams(temperature=0), tokens, ignore_eos=True
        )
        began = time.perf_counter()
        times = [time.perf_counter() for event in runtime.engine.generate(request) if isinstance(event, TokenEvent)]
        firsts.append(times[0] - began)
        gaps.append((times[-1] - times[0]) / (tokens - 1))
    return Measured(statistics.median(firsts), statistics.median(gaps))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    plugins, checkpoint = sleeping_plugins(), SleepingCheckpoint(SPEED)
    print(
        f"{'link':20}{'nodes':>6}{'token ms':>10}{'floor':>8}{'over':>8}{'first ms':>10}{'compute':>9}{'wire':>7}{'ratio':>7}"
    )
    for name, shape in LINKS.items():
        for nodes in given.nodes:
            with LocalCluster(
                plugins, checkpoint, ShapedTransport(TcpTransport(), shape), cut(nodes), None, LinkTiming()
            ) as cluster:
                found = measure(cluster.open_text(), given.prompt, given.tokens, given.rounds)
            taken = HIDDEN / shape.rate if shape.rate else 0.0
            floor = SPEED.fixed + (nodes + 1) * (shape.latency + taken)
            compute, wire = given.prompt * SPEED.each, given.prompt * taken
            values = (1e3 * found.token, 1e3 * floor, 100 * (found.token / floor - 1), 1e3 * found.first)
            ratio = found.first / max(compute, wire)
            print(
                f"{name:20}{nodes:6}" + "".join(f"{v:10.2f}" for v in (*values, 1e3 * compute, 1e3 * wire, ratio)), flush=True
            )


if __name__ == "__main__":
    main()
