"""Downloads, against a hub of our own on loopback: what is fetched, resumed, verified, and every refusal with its remedy."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cake_core.errors import CheckpointError
from cake_core.hub import needed_files
from cake_core.models import HubId
from cake_core.testing.toy_gguf import write_toy_gguf

pytest.importorskip("huggingface_hub")

COMMIT = "c" * 40
LARGE = 6 << 20


def safetensors(nbytes: int) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    return (
        len(header).to_bytes(8, "little")
        + header
        + bytes(i % 251 for i in range(1000)) * (nbytes // 1000)
        + bytes(nbytes % 1000)
    )


class Hub(ThreadingHTTPServer):
    """Serves `repositories`: name -> path -> bytes. `limits`: where in a file the next answers break off."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.limits: dict[str, list[int]] = {}
        self.damage: set[str] = set()
        self.served: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of these tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        path = self.path.partition("?")[0]
        if match := re.match(r"/api/models/([^/]+/[^/]+)(?:/revision/\w+)?$", path):
            self.describe(match[1])
        elif match := re.match(r"/([^/]+/[^/]+)/resolve/\w+/(.+)$", path):
            self.file(match[1], match[2], body)
        else:
            self.say(404, {"X-Error-Code": "RepoNotFound"}, b"{}", body)

    def refused(self, repo: str) -> bool:
        if repo not in self.server.repositories:
            self.say(404, {"X-Error-Code": "RepoNotFound"}, b'{"error":"not found"}', True)
        elif repo in self.server.gated:
            self.say(403, {"X-Error-Code": "GatedRepo"}, b'{"error":"gated"}', True)
        else:
            return False
        return True

    def describe(self, repo: str) -> None:
        if not self.refused(repo):
            files = self.server.repositories[repo]
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            self.say(200, {}, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode(), True)

    def file(self, repo: str, name: str, body: bool) -> None:
        if self.refused(repo):
            return
        data = self.server.repositories[repo].get(name)
        if data is None:
            self.say(404, {"X-Error-Code": "EntryNotFound"}, b"", body)
            return
        large = len(data) > 1 << 20
        etag = hashlib.sha256(data).hexdigest() if large else hashlib.sha1(data, usedforsecurity=False).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        if not body:
            self.say(200, headers, data, False)
            return
        if name in self.server.damage:
            data = bytes(len(data))
        wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(wanted[1]) if wanted else 0
        self.server.served.append((name, f"{start}-"))
        limits = self.server.limits.get(name)
        self.say(206 if wanted else 200, headers, data[start:], True, limits.pop(0) - start if limits else None)

    def say(self, status: int, headers: Mapping[str, str], data: bytes, body: bool, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self.close_connection = True


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    gguf = write_toy_gguf(tmp_path / "t.gguf", {"general.architecture": "llama"}, {}).read_bytes()
    server.repositories["org/text"] = {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "README.md": b"not needed",
        "pytorch_model.bin": b"not needed",
        "original/consolidated.00.pth": b"not needed",
        "model.safetensors": safetensors(LARGE),
    }
    server.repositories["org/gguf"] = {"m-Q4_K_M.gguf": gguf, "m-Q8_0.gguf": gguf, "mmproj-F16.gguf": gguf, "README.md": b""}
    server.repositories["org/old"] = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


DRIVER = """
import json, sys
from cake_core.errors import CheckpointError
from cake_core.hub import pull
from cake_core.models import HubId
reports = []
try:
    checkpoint = pull(HubId.parse(sys.argv[1]), lambda *report: reports.append(report))
    print(json.dumps({"name": checkpoint.name, "format": checkpoint.format, "path": str(checkpoint.path), "reports": reports}))
except CheckpointError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def pull(hub: Hub, home: Path, reference: str, **environment: str) -> dict[str, Any]:
    """A pull in its own process, since huggingface_hub reads its settings when it is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HOME": str(home), **environment}
    command = [sys.executable, "-c", DRIVER, reference]
    done = subprocess.run(command, env={**kept, **settings}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_only_what_is_needed_is_fetched_with_progress(hub: Hub, home: Path) -> None:
    found = pull(hub, home, "org/text")
    assert (found["name"], found["format"]) == ("org/text", "safetensors")
    here = sorted(path.name for path in Path(found["path"]).iterdir())
    assert here == ["config.json", "model.safetensors", "tokenizer.json"]
    total = sum(len(hub.repositories["org/text"][name]) for name in here)
    assert found["reports"][-1] == [total, total]
    assert found["reports"] == sorted(found["reports"])
    assert len(found["reports"]) > 5
    assert (Path(found["path"]) / "model.safetensors").read_bytes() == hub.repositories["org/text"]["model.safetensors"]


def test_a_second_pull_fetches_nothing(hub: Hub, home: Path) -> None:
    pull(hub, home, "org/text")
    hub.served.clear()
    assert pull(hub, home, "org/text")["name"] == "org/text"
    assert hub.served == []


def starts(hub: Hub) -> list[int]:
    return [int(start[:-1]) for name, start in hub.served if name == "model.safetensors"]


def test_a_broken_connection_is_taken_up_again(hub: Hub, home: Path) -> None:
    hub.limits["model.safetensors"] = [2_000_000, 5_000_000]
    assert pull(hub, home, "org/text")["name"] == "org/text"
    assert starts(hub) == [0, 2_000_000, 5_000_000]


def test_a_broken_download_goes_on_in_the_next_process(hub: Hub, home: Path) -> None:
    hub.limits["model.safetensors"] = [5_000_000, 5_000_000]
    error = pull(hub, home, "org/text")["error"]
    assert "cannot download org/text" in error
    assert "`cake pull org/text` goes on" in error
    found = pull(hub, home, "org/text")
    assert starts(hub) == [0, 5_000_000, 5_000_000]
    assert (Path(found["path"]) / "model.safetensors").read_bytes() == hub.repositories["org/text"]["model.safetensors"]
    assert not list(home.rglob("*.incomplete"))


def test_two_pulls_at_once_share_one_download(hub: Hub, home: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: pull(hub, home, "org/text"), range(2)))
    assert [result["name"] for result in found] == ["org/text"] * 2
    assert starts(hub) == [0]


def test_a_repository_of_gguf_files_stays_one_model_when_several_are_here(hub: Hub, home: Path) -> None:
    pull(hub, home, "org/gguf:Q8_0")
    assert pull(hub, home, "org/gguf")["path"].endswith("m-Q4_K_M.gguf")
    assert pull(hub, home, "org/gguf")["path"].endswith("m-Q4_K_M.gguf")


def test_damage_on_the_way_is_noticed(hub: Hub, home: Path) -> None:
    hub.damage.add("model.safetensors")
    assert "arrived damaged and was deleted; pull it again" in pull(hub, home, "org/text")["error"]
    hub.damage.clear()
    assert pull(hub, home, "org/text")["name"] == "org/text"


@pytest.mark.parametrize(
    ("reference", "file"),
    [("org/gguf", "m-Q4_K_M.gguf"), ("org/gguf:q8_0", "m-Q8_0.gguf"), ("org/gguf/m-Q8_0.gguf", "m-Q8_0.gguf")],
)
def test_one_quantisation_is_fetched(hub: Hub, home: Path, reference: str, file: str) -> None:
    found = pull(hub, home, reference)
    assert found["format"] == "gguf"
    assert {name for name, _ in hub.served} == {file}


def test_the_token_is_sent(hub: Hub, home: Path) -> None:
    pull(hub, home, "org/text", HF_TOKEN="hf_secret")
    assert hub.tokens == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("reference", "environment", "parts"),
    [
        ("org/none", {}, ["no org/none", "private", "HF_TOKEN", "spelling"]),
        ("org/none", {"HF_TOKEN": "hf_x"}, ["no org/none", "your token has no access"]),
        ("org/gated", {}, ["is gated", "accept its terms at https://", "HF_TOKEN"]),
        ("org/text", {"HF_HUB_OFFLINE": "1"}, ["is not in", "HF_HUB_OFFLINE", "unset it"]),
        ("org/old", {}, ["only pytorch_model.bin", "look for a safetensors version"]),
        ("org/gguf:Q2_K", {}, ["no GGUF file for org/gguf:Q2_K", "m-Q4_K_M.gguf"]),
        ("org/gguf/x.gguf", {}, ["no GGUF file for org/gguf/x.gguf"]),
        ("org/text", {"HF_ENDPOINT": "http://127.0.0.1:9"}, ["cannot download org/text", "check the network"]),
    ],
)
def test_every_refusal_says_what_to_do(
    hub: Hub, home: Path, reference: str, environment: dict[str, str], parts: list[str]
) -> None:
    hub.repositories["org/gated"] = hub.repositories["org/text"]
    hub.gated.add("org/gated")
    message = pull(hub, home, reference, **environment)["error"]
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_a_full_disk_is_noticed_before_the_download(hub: Hub, home: Path) -> None:
    driver = "import shutil, collections; shutil.disk_usage = lambda p: collections.namedtuple('u', 'free')(1000)\n"
    code = driver + DRIVER
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, "org/text"], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    message = json.loads(done.stdout)["error"]
    assert "is full" in message
    assert "HF_HOME" in message
    assert hub.served == []


def test_files_of_a_sharded_model() -> None:
    names = [
        "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "consolidated.safetensors", "model.safetensors", "tokenizer.model", "generation_config.json", "LICENSE", "a/b.json",
    ]  # fmt: skip
    assert needed_files(HubId("o/n"), names) == [
        "config.json", "generation_config.json", "tokenizer.model", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip


def test_files_of_a_gguf_in_parts() -> None:
    names = [f"Q8_0/m-Q8_0-0000{n}-of-00002.gguf" for n in (1, 2)] + ["m-Q2_K.gguf"]
    assert needed_files(HubId("o/n", "Q8_0"), names) == names[:2]
    assert needed_files(HubId("o/n"), names) == names[:2]


def test_files_of_a_diffusers_model_come_in_fp16_once() -> None:
    names = [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt", "v1-5.ckpt",
        "v1-5.safetensors", "unet/diffusion_flax_model.msgpack", "scheduler/scheduler_config.json",
    ]  # fmt: skip
    assert set(needed_files(HubId("o/n"), names)) == {
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt",
        "scheduler/scheduler_config.json",
    }  # fmt: skip


def test_a_single_file_is_fetched_alone(hub: Hub, home: Path) -> None:
    hub.repositories["org/photo"] = {"a.safetensors": safetensors(5000), "b.safetensors": safetensors(5000), "a.yaml": b""}
    found = pull(hub, home, "org/photo/a.safetensors")
    assert (found["name"], found["format"]) == ("org/photo/a.safetensors", "safetensors")
    assert [path.name for path in Path(found["path"]).parent.iterdir()] == ["a.safetensors"]
    assert (
        "org/photo has no file c.safetensors; its safetensors files: a.safetensors, b.safetensors"
        in (pull(hub, home, "org/photo/c.safetensors")["error"])
    )


def test_a_repository_without_weights() -> None:
    with pytest.raises(CheckpointError, match="o/n has no weights"):
        needed_files(HubId("o/n"), ["README.md"])
