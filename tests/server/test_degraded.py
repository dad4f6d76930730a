"""A worker is lost under requests: who waits is told, who asks is told, and when it is back everything goes on."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.server.test_streams import CHAT, LONG, eventually, idle

from cake_core.errors import QueueFullError
from cake_core.plugins import Plugins
from cake_core.testing.cluster import LocalCluster
from cake_core.testing.memory import MemoryTransport
from cake_core.testing.toys import write_toy_checkpoint
from cake_server.testing import LiveServer

SHORT = {**LONG, "max_tokens": 12}


@pytest.fixture
def cluster(tmp_path: Any) -> Iterator[LocalCluster]:
    checkpoint = write_toy_checkpoint(tmp_path / "toy", layers=2, seconds_per_batch=0.005)
    running = LocalCluster(Plugins(entries=()), checkpoint, MemoryTransport(), {"attic": ["model.layers.1"]})
    yield running
    running.close()


def health(server: LiveServer) -> str:
    return str(httpx.get(f"{server.url}/health").json().get("status", ""))


def test_a_lost_worker_and_its_return(cluster: LocalCluster) -> None:
    runtime = cluster.open_text(rejoin=0.5)
    with LiveServer(runtime) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        before = client.post(CHAT, json=SHORT).json()["choices"]
        with client.stream("POST", CHAT, json={**LONG, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            cluster.stop("attic")
            rest = list(lines)
        assert '"code":"cluster_degraded"' in rest[-4]
        assert "attic" in rest[-4]
        assert rest[-2] == "data: [DONE]"
        assert eventually(lambda: client.get("/health").status_code == 503)
        refused = client.post(CHAT, json=SHORT)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert refused.json()["error"]["type"] == "unavailable_error"
        assert client.post("/tokenize", json={"prompt": "x"}).status_code == 200, "what needs no worker goes on"
        cluster.start("attic")
        assert eventually(lambda: health(server) == "ok")
        assert client.post(CHAT, json=SHORT).json()["choices"] == before
        assert eventually(lambda: idle(runtime))


def test_every_stage_tells_its_work_and_its_cache(cluster: LocalCluster) -> None:
    runtime = cluster.open_text()

    def found(client: httpx.Client) -> dict[str, float]:
        samples = [line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in samples}

    def stage(what: str, node: str, layers: str) -> str:
        return f'cake_stage_{what}{{layers="{layers}",node="{node}"}}'

    attic = "attic", "model.layers.1"
    with LiveServer(runtime) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        client.post(CHAT, json=SHORT).raise_for_status()
        assert eventually(lambda: found(client).get(stage("batches_total", *attic), 0) == found(client)["cake_batches_total"])
        last = found(client)
        assert last[stage("positions_total", *attic)] == last["cake_positions_total"]
        own = stage("compute_seconds_total", "master", "model.embed_tokens, model.layers.0")
        assert 0 < last[own] < last["cake_batch_seconds_total"]
        computed = sum(value for name, value in last.items() if name.startswith("cake_stage_compute_seconds_total"))
        assert last[stage("compute_seconds_total", *attic)] < computed < last["cake_batch_seconds_total"]
        assert last[stage("compute_seconds_total", *attic)] < last['cake_leg_seconds_total{way="attic"}']
        assert 0 < last[stage("kv_usage_ratio", *attic)] < 1


def test_a_worker_that_is_back_in_time_costs_no_answer(cluster: LocalCluster) -> None:
    runtime = cluster.open_text(rejoin=20.0)
    with LiveServer(runtime) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        expected = client.post(CHAT, json={**LONG, "max_tokens": 60}).json()["choices"][0]["message"]["content"]
        found: list[str] = []
        asking = threading.Thread(
            target=lambda: found.append(httpx.post(server.url + CHAT, json={**LONG, "max_tokens": 60}, timeout=30).text)
        )
        asking.start()
        assert eventually(lambda: runtime.engine.stats().running == 1)
        cluster.stop("attic")
        cluster.start("attic")
        asking.join()
    assert json.loads(found[0])["choices"][0]["message"]["content"] == expected


def test_a_full_queue_says_when_to_come_back(start: Any, scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, engine = scripted("A")

    def full(*_: Any) -> None:
        raise QueueFullError("512 requests are waiting already; try again later")

    monkeypatch.setattr(engine, "submit", full)
    server = start(runtime)
    for stream in (False, True):
        response = httpx.post(server.url + CHAT, json={**LONG, "stream": stream})
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert response.json()["error"]["code"] == "queue_full"
    assert not server.service.jobs
