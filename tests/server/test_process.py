"""`cake serve` as a process: up before its model, waiting for workers by name, gone within five seconds of a signal."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result

from cake_core.cli.main import make_cli
from cake_core.testing.toys import write_toy_checkpoint

RUN = "from cake_core.cli.main import main; main()"


@contextlib.contextmanager
def serving(tmp_path: Path, *arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A running `cake serve` and its URL."""
    log = tmp_path / "log"
    places = {"CAKE_CONFIG_DIR": str(tmp_path / "config"), "CAKE_CACHE_DIR": str(tmp_path / "cache"), "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", RUN, "serve", "--api", "127.0.0.1:0", *arguments]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, env={**os.environ, **places, **environment})
    try:
        yield process, _url(process, log)
    finally:
        process.kill()
        process.wait(10)


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = re.search(r"listening on (http://\S+)", log.read_text())
        if found:
            return found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    raise TimeoutError(log.read_text())


def until_ready(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        time.sleep(0.05)
    raise TimeoutError("the server did not get ready")


def stopped(process: subprocess.Popen[bytes], how: int = signal.SIGTERM) -> float:
    begun = time.monotonic()
    process.send_signal(how)
    process.wait(15)
    return time.monotonic() - begun


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_toy_checkpoint(tmp_path / "toy", layers=2, seconds_per_batch=0.01).path


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_open_stream_and_the_process(tmp_path: Path, model: Path, how: int) -> None:
    with serving(tmp_path, "--model", str(model)) as (process, url):
        until_ready(url)
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "ignore_eos": True, "max_tokens": 3000}
        with httpx.Client() as client, client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            took = stopped(process, how)
            rest = list(lines)
        assert took < 5
        assert "data: [DONE]" in rest
        assert process.returncode in (0, -how, 130)


def test_a_missing_worker_is_named_until_the_server_is_stopped(tmp_path: Path, model: Path) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port, and nobody answers
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        topology = tmp_path / "topology.yml"
        topology.write_text(f"attic:\n  host: '{address}'\n  layers: ['model.layers.0']\n")
        arguments = ("--model", str(model), "--topology", str(topology), "--insecure")
        with serving(tmp_path, *arguments) as (process, url):
            deadline = time.monotonic() + 30
            error: dict[str, Any] = {}
            while "attic" not in error.get("message", "") and time.monotonic() < deadline:
                response = httpx.post(f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
                assert response.status_code == 503
                error = response.json()["error"]
                time.sleep(0.05)
            assert "attic" in error["message"]
            assert address in error["message"]
            assert stopped(process) < 5


def test_defaults_of_the_command_line_reach_requests(tmp_path: Path, model: Path) -> None:
    arguments = ("--model", str(model), "--max-tokens", "7", "--seed", "5", "--name", "cake", "--alias", "gpt-4o-mini")
    with serving(tmp_path, *arguments, CAKE_API_KEY="secret") as (_, url):
        until_ready(url)
        body = {"messages": [{"role": "user", "content": "x"}], "ignore_eos": True, "model": "gpt-4o-mini"}
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 401
        headers = {"authorization": "Bearer secret"}
        answers = [httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers).json() for _ in range(2)]
        assert answers[0]["choices"] == answers[1]["choices"]
        assert answers[0]["usage"]["completion_tokens"] == 7
        assert httpx.get(f"{url}/v1/models", headers=headers).json()["data"][0]["id"] == "cake"


@pytest.fixture(autouse=True)
def quiet_again() -> Iterator[None]:
    """`serve` turns its log of requests on for the whole process."""
    yield
    logging.getLogger("cake_server.access").setLevel(logging.WARNING)


def run(tmp_path: Path, *arguments: str) -> Result:
    """`cake serve` in this process: enough for what ends before it serves."""
    places = {"CAKE_CONFIG_DIR": str(tmp_path / "config"), "CAKE_CACHE_DIR": str(tmp_path / "cache"), "HF_HOME": str(tmp_path)}
    return CliRunner().invoke(make_cli(), ["serve", *arguments], env={**places, "HF_HUB_OFFLINE": "1"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{tmp}/nothing"], "nothing"),
        (["--model", "{tmp}/toy", "--temperature", "-1"], "temperature"),
        (["--model", "{tmp}/toy", "--api-key", ""], "API key"),
        (["--model", "{tmp}/toy", "--api", "no.such.host.invalid:1"], "--api"),
        (["--model", "{tmp}/toy", "--cors-origin", "example"], "--cors-origin"),
        (["--model", "{tmp}/toy", "--topology", "{tmp}/missing.yml"], "missing.yml"),
    ],
)
def test_wrong_options_end_with_one_line_and_code_2(tmp_path: Path, model: Path, arguments: list[str], message: str) -> None:
    done = run(tmp_path, "--api", "127.0.0.1:0", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.exit_code == 2, done.output
    assert message in done.stderr


def test_a_taken_port_is_said(tmp_path: Path, model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run(tmp_path, "--model", str(model), "--api", f"127.0.0.1:{taken.getsockname()[1]}")
    assert done.exit_code == 2
    assert "choose another with --api" in done.stderr


def test_an_open_port_without_a_key_warns_with_the_command_that_adds_one(tmp_path: Path, model: Path) -> None:
    with serving(tmp_path, "--model", str(model), "--api", "0.0.0.0:0") as (_, url):
        port = url.rpartition(":")[2]
        until_ready(f"http://127.0.0.1:{port}")
        text = (tmp_path / "log").read_text()
    assert text.count("warning: anyone who reaches port") == 1
    assert "--api-key" in text
