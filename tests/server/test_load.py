"""256 clients at once on a model over two workers: nothing is lost or doubled, who leaves frees every stage."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from tests.server.test_streams import eventually, idle

from cake_core.plugins import Plugins
from cake_core.runtime import TextRuntime
from cake_core.testing.cluster import LocalCluster
from cake_core.testing.memory import MemoryTransport
from cake_core.testing.toys import toy_checkpoint
from cake_server.bench.client import Target, exchange
from cake_server.testing import LiveServer

pytestmark = pytest.mark.full

CLIENTS, TOKENS = 256, 24
LEAVING = 0.3
LAYERS = {"w0": ["model.embed_tokens", "model.layers.0-1"], "w1": ["model.layers.2-3", "model.norm", "lm_head"]}


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    running = LocalCluster(Plugins(entries=()), toy_checkpoint(), MemoryTransport(), LAYERS)
    yield running
    running.close()


def body(seed: int, stream: bool) -> bytes:
    asked = {
        "messages": [{"role": "user", "content": f"number {seed}"}],
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "seed": seed,
    }
    return json.dumps({**asked, "stream": stream}).encode()


async def whole(target: Target, seed: int) -> str:
    status, reader, writer = await exchange(target, "POST", "/chat/completions", body(seed, False))
    text = (await reader.read()).decode()
    writer.close()
    assert status == 200, text
    return str(json.loads(text)["choices"][0]["message"]["content"])


async def streamed(target: Target, seed: int, leave_after: int | None) -> str | None:
    """The text, or None for a client that left after so many chunks."""
    status, reader, writer = await exchange(target, "POST", "/chat/completions", body(seed, True))
    assert status == 200
    text, chunks, last = "", 0, b""
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            text += "".join(choice["delta"].get("content", "") for choice in json.loads(line[6:])["choices"])
            chunks += 1
        last = line if line.startswith(b"data: ") else last
        if leave_after is not None and chunks >= leave_after:
            writer.close()
            return None
    writer.close()
    assert last == b"data: [DONE]\n"
    return text


async def everybody(target: Target, leaving: dict[int, int]) -> list[str | None]:
    return await asyncio.gather(*(streamed(target, seed, leaving.get(seed)) for seed in range(CLIENTS)))


async def one_by_one(target: Target) -> list[str]:
    return await asyncio.gather(*(whole(target, seed) for seed in range(CLIENTS)))


def freed(cluster: LocalCluster, runtime: TextRuntime, server: LiveServer) -> bool:
    """Nothing runs, and the workers hold the sessions of kept prefixes and no other."""
    kept = runtime.engine.stats().prefixes
    sessions = [worker.sessions for worker in cluster.workers.values()]
    return idle(runtime) and not server.service.jobs and sessions == [kept] * len(sessions)


def test_many_clients_at_once(cluster: LocalCluster) -> None:
    draw: Any = random.Random(7)
    # Counted in chunks: a server that is fast, or a client that is slow, puts several tokens into one.
    leaving = {seed: draw.randint(1, TOKENS // 6) for seed in range(CLIENTS) if draw.random() < LEAVING}
    assert len(leaving) > CLIENTS / 5
    runtime = cluster.open_text()
    with LiveServer(runtime) as server:
        target = Target.parse(server.url, None)
        expected = asyncio.run(one_by_one(target))
        assert len(set(expected)) > CLIENTS / 2, "the seeds tell the answers apart"
        assert asyncio.run(everybody(target, {})) == expected
        some = asyncio.run(everybody(target, leaving))
        gone = {seed for seed, text in enumerate(some) if text is None}
        assert gone <= set(leaving)
        assert len(gone) > CLIENTS / 6, "tokens that come together may end an answer before its reader leaves"
        assert [(seed, text) for seed, text in enumerate(some) if seed not in gone and text != expected[seed]] == []
        assert eventually(lambda: freed(cluster, runtime, server))
