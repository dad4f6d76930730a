"""A long day of a server: `python benchmarks/soak.py --requests 100000`.

A toy model over two workers, all processes of this machine, and clients that ask, stream, leave in the middle, count tokens and
make mistakes. Prints memory, descriptors and threads of every process as the requests go by, and the slope of each memory
over the second half, when caches are full.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.clients.cluster_rig import Cluster, cluster

from cake_server.bench.client import Target, exchange

LOOKS = 20
HALVES = ("model.layers.0-1", "model.layers.2-3")
MEGABYTE = 1e6


@dataclass(frozen=True, slots=True)
class Look:
    """The processes at one moment; master first."""

    requests: int
    memory: tuple[float, ...]
    descriptors: tuple[int, ...]
    threads: tuple[int, ...]


def look(requests: int, processes: list[psutil.Process]) -> Look:
    return Look(
        requests,
        tuple(process.memory_info().rss / MEGABYTE for process in processes),
        tuple(process.num_fds() for process in processes),
        tuple(process.num_threads() for process in processes),
    )


async def one(target: Target, draw: random.Random) -> str:
    """One request of a kind that is drawn; gives what came of it."""
    kind, text = draw.random(), f"request {draw.randrange(10**6)}"
    if kind < 0.1:
        return await plain(target, "/chat/completions", {"messages": [{"role": "user", "content": text}], "top_p": 9})
    if kind < 0.2:
        return await plain(target, "/tokenize", {"prompt": text})
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": draw.randint(1, 8), "seed": 1}
    if kind < 0.4:
        return await plain(target, "/chat/completions", asked)
    return await stream(target, asked, leave=draw.randint(1, 4) if kind < 0.6 else None)


async def plain(target: Target, path: str, body: Any) -> str:
    status, reader, writer = await exchange(target, "POST", path, json.dumps(body).encode())
    await reader.read()
    writer.close()
    return str(status)


async def stream(target: Target, body: dict[str, Any], leave: int | None) -> str:
    if leave is not None:
        body |= {"max_tokens": 200, "ignore_eos": True}
    status, reader, writer = await exchange(target, "POST", "/chat/completions", json.dumps({**body, "stream": True}).encode())
    chunks, last = 0, b""
    while line := await reader.readline():
        if line.startswith(b"data: "):
            chunks, last = chunks + 1, line
        if leave is not None and chunks >= leave:
            break
    writer.close()
    whole = leave is not None or last == b"data: [DONE]\n"
    return f"{status} {'left' if leave is not None else 'streamed'}" if whole else "cut"


async def soak(
    running: Cluster, processes: list[psutil.Process], options: argparse.Namespace
) -> tuple[list[Look], Counter[str]]:
    target, results, looks = Target.parse(running.url, None), Counter[str](), []
    share = options.requests // LOOKS
    for part in range(LOOKS + 1):
        looks.append(look(part * share, processes))
        if part == LOOKS:
            break
        left = [share]

        async def client(number: int, left: list[int] = left, part: int = part) -> None:
            draw = random.Random(f"{options.seed} {part} {number}")
            while left[0] > 0:
                left[0] -= 1
                results[await one(target, draw)] += 1

        await asyncio.gather(*(client(number) for number in range(options.clients)))
        if not running.idle(10):
            raise SystemExit("something is still being generated")
        print(f"{(part + 1) * share:>8} requests", " ".join(f"{memory:8.2f} MB" for memory in looks[-1].memory), flush=True)
    return looks, results


def slope(looks: list[Look], process: int) -> float:
    """Megabytes for each 10,000 requests, by least squares over the second half."""
    half = looks[len(looks) // 2 :]
    xs, ys = [item.requests / 1e4 for item in half], [item.memory[process] for item in half]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="cake-soak-") as name,
        cluster(Path(name), "--model", "toy", cuts=HALVES) as running,
    ):
        processes = [psutil.Process(process.popen.pid) for process in (running.master, *running.workers)]
        begun = time.monotonic()
        looks, results = asyncio.run(soak(running, processes, options))
        seconds = time.monotonic() - begun
    first, last = looks[1], looks[-1]
    print(f"{options.requests} requests in {seconds:.0f} s: {dict(sorted(results.items()))}")
    for index, name in enumerate(("server", "worker 0", "worker 1")):
        pairs = [(getattr(first, what)[index], getattr(last, what)[index]) for what in ("memory", "descriptors", "threads")]
        memory, descriptors, threads = (f"{old:.4g} to {new:.4g}" for old, new in pairs)
        print(f"{name}: {slope(looks, index):+.3f} MB for 10,000 requests ({memory} MB)", end="; ")
        print(f"descriptors {descriptors}, threads {threads}")


if __name__ == "__main__":
    main()
