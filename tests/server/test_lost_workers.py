"""A worker lost in the middle of a stream, as the client sees it: the stream pauses and goes on, or ends with an error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.test_streams import CHAT, eventually, idle

from cake_core.plugins import Plugins
from cake_core.runtime import TextRuntime
from cake_core.testing.cluster import LocalCluster
from cake_core.testing.memory import MemoryTransport
from cake_core.testing.toys import write_toy_checkpoint

TOKENS = 24
REQUEST = {
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": TOKENS,
    "ignore_eos": True,
    "seed": 3,
    "stream": True,
    "stream_options": {"include_usage": True},
}
LAYERS = {"w0": ["model.layers.0"], "w1": ["model.layers.1"]}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    checkpoint = write_toy_checkpoint(tmp_path / "toy", layers=2, seconds_per_batch=0.002)
    with LocalCluster(Plugins(entries=()), checkpoint, MemoryTransport(), LAYERS) as made:
        yield made


class Reader:
    """One streamed answer, chunk by chunk."""

    def __init__(self, response: httpx.Response) -> None:
        self.text = ""
        self.usage: dict[str, Any] = {}
        self.error: dict[str, Any] = {}
        self.done = False
        self._lines = response.iter_lines()

    def read(self, pieces: int | None = None) -> None:
        """Reads on, until so many pieces of text have come or the stream ends."""
        for line in self._lines:
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                self.done = True
                continue
            chunk = json.loads(line.removeprefix("data: "))
            self.error = chunk.get("error", self.error)
            self.usage = chunk.get("usage") or self.usage
            for choice in chunk.get("choices", ()):
                piece = choice["delta"].get("content") or ""
                self.text += piece
                if piece and pieces is not None:
                    pieces -= 1
            if pieces == 0:
                return


def whole(client: httpx.Client) -> Reader:
    with client.stream("POST", CHAT, json=REQUEST) as response:
        reader = Reader(response)
        reader.read()
    assert reader.done
    return reader


@pytest.mark.parametrize("route", ["star", "chain"])
def test_a_stream_pauses_and_goes_on(route: str, start: Any, cluster: LocalCluster) -> None:
    runtime: TextRuntime = cluster.open_text(route=route, rejoin=20.0)
    server = start(runtime)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        undisturbed = whole(client)
        for name in LAYERS:
            for pieces in (1, 4, 8):
                with client.stream("POST", CHAT, json=REQUEST) as response:
                    reader = Reader(response)
                    reader.read(pieces)
                    cluster.stop(name)
                    cluster.start(name)
                    reader.read()
                assert (reader.text, reader.error, reader.done) == (undisturbed.text, {}, True)
                assert reader.usage == undisturbed.usage
                assert reader.usage["completion_tokens"] == TOKENS
    assert eventually(lambda: idle(runtime))


def test_a_stream_whose_worker_stays_away_ends_with_an_error_that_names_it(start: Any, cluster: LocalCluster) -> None:
    runtime = cluster.open_text(rejoin=0.3)
    server = start(runtime)
    with httpx.Client(base_url=server.url, timeout=30) as client, client.stream("POST", CHAT, json=REQUEST) as response:
        reader = Reader(response)
        reader.read(3)
        cluster.stop("w1")
        reader.read()
    assert reader.done
    assert reader.error["code"] == "cluster_degraded"
    assert "w1" in reader.error["message"]
    assert eventually(lambda: idle(runtime) and not server.service.jobs)
    assert eventually(lambda: cluster.workers["w0"].sessions == 0)
