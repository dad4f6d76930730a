"""Real servers on free ports over the toy models, a client for them, and an engine that says what a test tells it to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

import httpx
import pytest

from cake_core.engine.text import EngineStats
from cake_core.events import Finished, PromptDone, TextEvent, TokenEvent, Usage
from cake_core.plugins import Plugins
from cake_core.requests import TextRequest
from cake_core.runtime import ImageRuntime, RunSpec, TextRuntime, open_image, open_text
from cake_core.testing.toys import ToyTokenizer, toy_checkpoint, write_toy_checkpoint, write_toy_image_checkpoint
from cake_core.topology import Topology
from cake_server.settings import Settings
from cake_server.testing import LiveServer


@pytest.fixture(scope="session")
def runtime() -> Iterator[TextRuntime]:
    """The toy text model, all of it here."""
    opened = open_text(Plugins(entries=()), RunSpec(toy_checkpoint(), Topology()))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def slow_runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TextRuntime]:
    """A toy that takes 5 ms a batch: slow enough to stop, leave and overtake."""
    checkpoint = write_toy_checkpoint(tmp_path_factory.mktemp("slow"), layers=1, seconds_per_batch=0.005)
    opened = open_text(Plugins(entries=()), RunSpec(checkpoint, Topology()))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def image_runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageRuntime]:
    checkpoint = write_toy_image_checkpoint(tmp_path_factory.mktemp("image") / "toy-image", seconds_per_step=0.002)
    opened = open_image(Plugins(entries=()), RunSpec(checkpoint, Topology()))
    yield opened
    opened.close()


@pytest.fixture
def start() -> Iterator[Callable[..., LiveServer]]:
    """`start(runtime, **settings)` starts a server; all of them are stopped when the test ends."""
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


class ScriptedEngine:
    """Answers every request with the same events, from a thread of its own; keeps the requests it got."""

    def __init__(self, script: Sequence[TextEvent], held: threading.Event | None = None) -> None:
        self.script = script
        self.held = held
        self.requests: list[TextRequest] = []
        self.cancelled = threading.Event()

    def submit(self, request: TextRequest, sink: Callable[[Sequence[TextEvent]], None]) -> ScriptedEngine:
        self.requests.append(request)
        threading.Thread(target=self._run, args=(sink,), daemon=True).start()
        return self

    def _run(self, sink: Callable[[Sequence[TextEvent]], None]) -> None:
        if self.held is not None:
            self.held.wait(20)
        for event in self.script:
            sink([event])

    def cancel(self) -> None:
        self.cancelled.set()

    def stats(self) -> EngineStats:
        return EngineStats(*(0 for field in fields(EngineStats) if field.default_factory is MISSING))


class TemplateTokenizer(ToyTokenizer):
    """The toy's, with another family's chat template in its files."""

    def __init__(self, template: str) -> None:
        self.template = template

    def describe(self) -> Mapping[str, Any]:
        return {**super().describe(), "chat_template": self.template}


@pytest.fixture
def scripted(runtime: TextRuntime) -> Callable[..., tuple[Any, ScriptedEngine]]:
    """`scripted(text, template="", reason="stop")` gives a runtime whose engine says `text`, three characters at a time."""

    def make(text: str = "", template: str = "", reason: Any = "stop", script: Any = None, held: Any = None) -> Any:
        pieces = [text[start : start + 3] for start in range(0, len(text), 3)]
        usage = Usage(5, len(pieces))
        events = [PromptDone(Usage(5)), *(TokenEvent(65, piece) for piece in pieces), Finished(reason, "", usage)]
        engine = ScriptedEngine(events if script is None else script, held)
        made = replace(runtime, tokenizer=TemplateTokenizer(template), engine=engine)  # type: ignore[arg-type, unused-ignore]
        return made, engine

    return make
