"""Real servers on free ports over the toy models, and a client for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cake_core.plugins import Plugins
from cake_core.runtime import ImageRuntime, RunSpec, TextRuntime, open_image, open_text
from cake_core.testing.toys import toy_checkpoint, write_toy_checkpoint, write_toy_image_checkpoint
from cake_core.topology import Topology
from cake_server.settings import Settings
from cake_server.testing import LiveServer

Start = Callable[..., LiveServer]


@pytest.fixture(scope="session")
def runtime() -> Iterator[TextRuntime]:
    """The toy text model, all of it here."""
    opened = open_text(Plugins(entries=()), RunSpec(toy_checkpoint(), Topology()))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def slow_runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TextRuntime]:
    """A toy that takes 5 ms a batch: slow enough to stop, leave and overtake."""
    folder: Path = tmp_path_factory.mktemp("slow")
    checkpoint = write_toy_checkpoint(folder, layers=1, seconds_per_batch=0.005)
    opened = open_text(Plugins(entries=()), RunSpec(checkpoint, Topology()))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def image_runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageRuntime]:
    checkpoint = write_toy_image_checkpoint(tmp_path_factory.mktemp("image"), seconds_per_step=0.002)
    opened = open_image(Plugins(entries=()), RunSpec(checkpoint, Topology()))
    yield opened
    opened.close()


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts servers; all of them are stopped when the test ends."""
    servers: list[LiveServer] = []

    def make(runtime: Any = None, **settings: Any) -> LiveServer:
        servers.append(LiveServer(runtime, Settings(**settings)))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(runtime: TextRuntime) -> Iterator[LiveServer]:
    """One server with default settings, for tests that leave nothing behind in it."""
    with LiveServer(runtime) as live:
        yield live


@pytest.fixture
def api(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture
def image_api(image_runtime: ImageRuntime) -> Iterator[httpx.Client]:
    with LiveServer(image_runtime) as live, httpx.Client(base_url=live.url, timeout=30) as client:
        yield client
