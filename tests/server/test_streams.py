"""Streams under bad conditions: clients that leave, that do not read, that come all at once, and a server that stops."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from cake_core.events import Finished, PromptDone, TokenEvent, Usage
from cake_core.runtime import TextRuntime
from cake_server import protocol

CHAT = "/v1/chat/completions"
LONG = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2000, "ignore_eos": True, "seed": 3}


def eventually(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.01)
    return true()


def idle(runtime: TextRuntime) -> bool:
    stats = runtime.engine.stats()
    return stats.running == stats.waiting == 0


def test_leaving_a_stream_frees_its_sequence(start: Any, slow_runtime: TextRuntime) -> None:
    server = start(slow_runtime)
    with httpx.Client(base_url=server.url) as client, client.stream("POST", CHAT, json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()
        for _ in range(6):
            next(lines)
        assert slow_runtime.engine.stats().running == 1
    assert eventually(lambda: idle(slow_runtime))
    assert eventually(lambda: not server.service.jobs)


def test_leaving_a_whole_answer_frees_its_sequence(start: Any, slow_runtime: TextRuntime) -> None:
    server = start(slow_runtime)
    body = json.dumps(LONG).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert eventually(lambda: slow_runtime.engine.stats().running == 1)
    assert eventually(lambda: idle(slow_runtime))
    assert eventually(lambda: not server.service.jobs)


def test_cancelling_by_id(start: Any, slow_runtime: TextRuntime) -> None:
    server = start(slow_runtime)
    with httpx.Client(base_url=server.url) as client:
        with client.stream("POST", CHAT, json={**LONG, "stream": True}) as response:
            lines = response.iter_lines()
            identity = json.loads(next(lines).removeprefix("data: "))["id"]
            assert client.post(f"/v1/cancel/{identity}").json()["cancelled"] is True
            rest = list(lines)
        assert rest[-2] == "data: [DONE]"
        assert '"code":"cancelled"' in rest[-4]
        assert client.delete(f"/api/v1/requests/{identity}").status_code == 404
    assert eventually(lambda: idle(slow_runtime))


def test_a_quiet_stream_is_kept_alive_with_comments(start: Any, scripted: Any) -> None:
    held = threading.Event()
    script = [PromptDone(Usage(1)), TokenEvent(65, "A"), Finished("stop", "", Usage(1, 1))]
    runtime, _ = scripted(script=script, held=held)
    server = start(runtime, keep_alive=0.05, first_event_wait=0.01)
    with httpx.Client(base_url=server.url) as client, client.stream("POST", CHAT, json={**LONG, "stream": True}) as response:
        lines = [line for line in _until(response.iter_lines(), ": keep-alive", 3, held) if line]
    assert lines.count(": keep-alive") >= 3
    data = [line for line in lines if line.startswith("data: ")]
    assert '"content":"A"' in data[1]
    assert data[-1] == "data: [DONE]"


def _until(lines: Any, wanted: str, count: int, then: threading.Event) -> list[str]:
    """All lines; sets `then` once `wanted` has come `count` times."""
    found: list[str] = []
    for line in lines:
        found.append(line)
        if found.count(wanted) >= count:
            then.set()
    return found


def test_a_reader_that_stops_reading_is_dropped(start: Any, scripted: Any) -> None:
    """More text than the sockets hold: the sender stalls, and after `stall_timeout` the connection is gone."""
    script = [PromptDone(Usage(1)), *(TokenEvent(65, "x" * 20_000) for _ in range(3000))]
    runtime, engine = scripted(script=script)
    server = start(runtime, keep_alive=0.05, stall_timeout=0.2, max_unread=10**6)
    body = json.dumps({**LONG, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert engine.cancelled.wait(10)
        assert eventually(lambda: not server.service.jobs)


def test_a_reader_too_slow_for_its_tokens_is_cancelled(start: Any, scripted: Any) -> None:
    script = [PromptDone(Usage(1)), *(TokenEvent(65, "x" * 20_000) for _ in range(3000))]
    runtime, engine = scripted(script=script)
    server = start(runtime, max_unread=100)
    body = json.dumps({**LONG, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert engine.cancelled.wait(10)


def test_stopping_ends_streams_with_an_error_they_can_read(start: Any, slow_runtime: TextRuntime) -> None:
    server = start(slow_runtime)
    with httpx.Client(base_url=server.url) as client, client.stream("POST", CHAT, json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        taken: list[float] = []
        stopper = threading.Thread(target=lambda: taken.append(server.stop()))
        stopper.start()
        rest = list(lines)
        stopper.join()
    assert '"code":"shutting_down"' in rest[-4]
    assert rest[-2] == "data: [DONE]"
    assert taken[0] < 5
    assert eventually(lambda: idle(slow_runtime))


def test_stopping_does_not_wait_for_idle_connections_or_watchers(start: Any, runtime: TextRuntime) -> None:
    server = start(runtime)
    with httpx.Client(base_url=server.url) as client, client.stream("GET", "/api/v1/cluster/events") as response:
        next(response.iter_lines())
        with socket.create_connection(("127.0.0.1", server.port)):
            assert server.stop() < 5


def test_many_streams_lose_and_double_nothing_while_some_leave(start: Any, runtime: TextRuntime) -> None:
    """48 clients; every third one leaves in the middle. The others get exactly what the engine says for their seed."""
    server = start(runtime)

    async def one(client: httpx.AsyncClient, seed: int) -> str:
        body = {**LONG, "max_tokens": 40, "seed": seed, "stream": True}
        text = ""
        async with client.stream("POST", CHAT, json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        text += choice["delta"].get("content", "")
                if seed % 3 == 0 and len(text) > seed % 20:
                    return ""
        return text

    async def all_of_them() -> list[str]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            return list(await asyncio.gather(*(one(client, seed) for seed in range(48))))

    texts = asyncio.run(all_of_them())
    with httpx.Client(base_url=server.url) as client:
        for seed in (1, 2, 22, 47):
            body = {**LONG, "max_tokens": 40, "seed": seed}
            assert client.post(CHAT, json=body).json()["choices"][0]["message"]["content"] == texts[seed]
    assert eventually(lambda: idle(runtime) and not server.service.jobs)


def test_more_requests_than_allowed_are_told_to_come_back(start: Any, scripted: Any) -> None:
    held = threading.Event()
    runtime, _ = scripted("A", held=held)
    server = start(runtime, max_requests=1)
    results: list[int] = []
    with httpx.Client(base_url=server.url) as client:
        first = threading.Thread(target=lambda: results.append(httpx.post(server.url + CHAT, json=LONG).status_code))
        first.start()
        assert eventually(lambda: len(server.service.jobs) == 1)
        response = client.post(CHAT, json=LONG)
        held.set()
        first.join()
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["type"] == "rate_limit_error"
    assert results == [200]


def test_prefill_progress_travels_in_comments(api: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "x" * 3000}], "max_tokens": 1, "stream": True}
    comments = [line for line in api.post(CHAT, json=body).text.splitlines() if line.startswith(": prefill_progress")]
    done = [json.loads(line.removeprefix(": prefill_progress "))["done"] for line in comments]
    assert done
    assert done == sorted(done)


def test_pipelined_and_broken_requests_do_not_hurt(server: Any) -> None:
    for garbage in (
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/9\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
        b"A" * 70_000,
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(garbage)
            connection.settimeout(5)
            with contextlib.suppress(TimeoutError, ConnectionError):
                connection.recv(65536)
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_connection_that_never_asks_is_closed(start: Any, runtime: TextRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "FIRST_REQUEST_TIMEOUT", 0.1)
    server = start(runtime)
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        assert connection.recv(1) == b""


def test_headers_without_an_end_are_cut_off(server: Any) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n")
        with pytest.raises(ConnectionError):
            _send_headers(connection)


def _send_headers(connection: socket.socket) -> None:
    for _ in range(2000):
        connection.sendall(b"x-more: " + b"x" * 1000 + b"\r\n")
        time.sleep(0.001)
