"""What serving costs: the same answers from `cake serve` and from the engine alone, taking turns.

    python benchmarks/serving.py               # a toy that takes 20 ms a step: processor time of the server for each token
    python benchmarks/serving.py --model ''    # the default model: throughput

Processor time is that of the process that serves (the clients are another), less that of a process that does the same with
`Engine.submit` and looks at no event.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.clients.cluster_rig import cluster

from cake_server.bench.client import Target, exchange

PROMPT = "Why is the sky blue?"


@dataclass(frozen=True, slots=True)
class Round:
    """One round of all streams."""

    tokens: int
    seconds: float
    cpu: float


@dataclass(frozen=True, slots=True)
class Work:
    streams: int
    tokens: int


class Side(Protocol):
    def run(self, work: Work) -> Round: ...


class Engine:
    """A process of its own that submits to the engine and counts."""

    def __init__(self, model: str) -> None:
        command = [sys.executable, __file__, "--engine", "--model", model]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, work: Work) -> Round:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(work.streams, work.tokens, file=self.process.stdin, flush=True)
        return Round(**json.loads(self.process.stdout.readline()))


class Api:
    """`cake serve`, asked by clients in this process that count and parse nothing."""

    def __init__(self, url: str, process: int) -> None:
        self._target, self._process = Target.parse(url, None), psutil.Process(process)

    def run(self, work: Work) -> Round:
        before, begun = self._cpu(), time.monotonic()
        chunks = asyncio.run(self._everybody(work))
        seconds = time.monotonic() - begun
        assert chunks > work.streams * work.tokens / 2, "tokens came merged: the machine is too slow for this"
        return Round(work.streams * work.tokens, seconds, self._cpu() - before)

    def _cpu(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)

    async def _everybody(self, work: Work) -> int:
        return sum(await asyncio.gather(*(self._one(work, seed) for seed in range(work.streams))))

    async def _one(self, work: Work, seed: int) -> int:
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": work.tokens, "seed": seed}
        body = json.dumps({**asked, "ignore_eos": True, "stream": True}).encode()
        status, reader, writer = await exchange(self._target, "POST", "/chat/completions", body)
        assert status == 200
        chunks = 0
        while data := await reader.read(65536):
            chunks += data.count(b"data: ")
        writer.close()
        return chunks


def engine_side(model: str) -> None:
    """Answers each line `streams tokens` with the figures of such a round."""
    from cake_core.events import Failed, Finished
    from cake_core.plugins import Plugins
    from cake_core.requests import SamplingParams, TextRequest
    from cake_core.runtime import RunSpec, open_text
    from cake_core.topology import Topology

    plugins = Plugins()
    runtime = open_text(plugins, RunSpec(plugins.resolve(model), Topology()))
    tokenizer = runtime.tokenizer
    prompt = tuple(tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": PROMPT}]), add_special=False))
    for line in sys.stdin:
        streams, tokens = map(int, line.split())
        left, done = [streams], threading.Event()

        def sink(events: Any, left: list[int] = left, done: threading.Event = done) -> None:
            if isinstance(events[-1], Finished | Failed):
                left[0] -= 1
                if not left[0]:
                    done.set()

        cpu, begun = time.process_time(), time.monotonic()
        for seed in range(streams):
            runtime.engine.submit(TextRequest(prompt, SamplingParams(seed=seed), tokens), sink)
        done.wait()
        figures = {"tokens": streams * tokens, "seconds": time.monotonic() - begun, "cpu": time.process_time() - cpu}
        print(json.dumps(figures), flush=True)
    runtime.close()


def compare(engine: Side, api: Side, work: Work, rounds: int) -> None:
    for side in (engine, api):
        side.run(work)  # caches, compilation, the prompt's prefix
    pairs = []
    for turn in range(rounds):
        order = (engine, api) if turn % 2 else (api, engine)
        found = {side: side.run(work) for side in order}
        pairs.append((found[engine], found[api]))
    extra = [(served.cpu - alone.cpu) / served.tokens * 1e6 for alone, served in pairs]
    rate = [alone.seconds / served.seconds for alone, served in pairs]
    print(f"{work.streams} streams of {work.tokens} tokens, {rounds} rounds taking turns, medians:")
    for name, index in (("engine alone", 0), ("with the API", 1)):
        cpu = statistics.median(pair[index].cpu / pair[index].tokens * 1e6 for pair in pairs)
        speed = statistics.median(pair[index].tokens / pair[index].seconds for pair in pairs)
        print(f"  {name}: {speed:9.1f} tokens/s, {cpu:7.1f} us of processor a token")
    print(f"  the API: {statistics.median(extra):.1f} us a token ({min(extra):.1f} to {max(extra):.1f}); ", end="")
    print(f"{statistics.median(rate):.3f} of the engine's throughput ({min(rate):.3f} to {max(rate):.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: a toy that takes 20 ms a step; '' is the default model of Cake")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        engine_side(options.model)
        return
    with tempfile.TemporaryDirectory(prefix="cake-serving-") as folder:
        model = options.model if options.model is not None else slow_toy(Path(folder) / "toy")
        with cluster(Path(folder), *(["--model", model] if model else [])) as running:
            engine = Engine(model)
            try:
                work = Work(options.streams, options.tokens)
                compare(engine, Api(running.url, running.master.popen.pid), work, options.rounds)
            finally:
                engine.process.communicate()


def slow_toy(folder: Path) -> str:
    from cake_core.testing.toys import write_toy_checkpoint

    return os.fspath(write_toy_checkpoint(folder, layers=1, seconds_per_batch=0.02).path)


if __name__ == "__main__":
    main()
