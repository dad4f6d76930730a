"""When requests are sent: a closed loop of clients, or an open one that does not wait for the server."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from cake_server.bench.client import Sample, Target, measure

Send = Callable[[int], Awaitable[Sample]]

_WORDS = ("the", "of", "and", "to", "in", "is", "that", "it", "for", "was", "on", "as", "with", "be", "by", "at", "this")


@dataclass(frozen=True, slots=True)
class Load:
    """`requests` requests; `concurrency` clients one after another, or `rate` a second at random moments."""

    requests: int
    concurrency: int
    rate: float | None
    input_tokens: int
    output_tokens: int
    warmup: int
    seed: int
    timeout: float

    def body(self, model: str, index: int) -> bytes:
        """A prompt of about `input_tokens` tokens, different for each index so that no cache helps by accident."""
        chosen = random.Random(f"{self.seed} {index}")  # noqa: S311 - a workload, not a secret
        words = " ".join(chosen.choice(_WORDS) for _ in range(self.input_tokens))
        body = {
            "model": model,
            "messages": [{"role": "user", "content": f"{index}: {words}"}],
            "max_tokens": self.output_tokens,
            "ignore_eos": True,
            "temperature": 0.7,
            "seed": index,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(body).encode()


async def run_load(target: Target, model: str, load: Load) -> list[Sample]:
    """Warms up, then measures. Samples are in the order of their start."""

    def send(index: int) -> Awaitable[Sample]:
        return measure(target, load.body(model, index), load.timeout)

    for index in range(load.warmup):
        await send(-1 - index)
    samples = await (_open(send, load) if load.rate else _closed(send, load))
    return sorted(samples, key=lambda sample: sample.start)


async def _closed(send: Send, load: Load) -> list[Sample]:
    indices, samples = iter(range(load.requests)), list[Sample]()

    async def client() -> None:
        for index in indices:
            samples.append(await send(index))

    await asyncio.gather(*(client() for _ in range(min(load.concurrency, load.requests))))
    return samples


async def _open(send: Send, load: Load) -> list[Sample]:
    """Arrivals as of many independent users: exponential gaps."""
    chosen = random.Random(load.seed)  # noqa: S311 - as above
    tasks = []
    for index in range(load.requests):
        tasks.append(asyncio.ensure_future(send(index)))
        await asyncio.sleep(chosen.expovariate(load.rate or 1.0))
    return list(await asyncio.gather(*tasks))
