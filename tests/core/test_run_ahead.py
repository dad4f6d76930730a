"""A stage that completes later, as a GPU does: the engine submits the next position before it has seen the token."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cake_core.engine.pipeline import Pipeline
from cake_core.engine.text import TextEngine
from cake_core.events import TokenEvent
from cake_core.model import SAMPLED, Batch, LoadOptions, Memory, Pending, SessionSpec, TextStage, int32_values
from cake_core.requests import SamplingParams, TextRequest
from cake_core.stages.stage import LocalStage
from cake_core.testing.toys import ToyTextBackend, write_toy_checkpoint


class LateStage:
    """A toy stage behind a queue: `submit` returns at once."""

    runs_ahead = True

    def __init__(self, stage: TextStage) -> None:
        self.layers = stage.layers
        self.ahead = 0
        self._stage = stage
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[tuple[Batch, Pending] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            batch, pending = item
            time.sleep(0.001)
            with self._lock:
                done = self._stage.submit(batch)
            try:
                pending.set(done.result())
            except Exception as error:
                pending.fail(error)

    def submit(self, batch: Batch) -> Pending:
        pending = Pending()
        self.ahead += int32_values(batch.tensors["tokens"]).count(SAMPLED)
        self._queue.put((batch, pending))
        return pending

    def open(self, session: int, spec: SessionSpec, parent: int | None = None, length: int = 0) -> int:
        with self._lock:
            return self._stage.open(session, spec, parent, length)

    def truncate(self, session: int, length: int) -> int:
        with self._lock:
            return self._stage.truncate(session, length)

    def close(self, session: int) -> None:
        with self._lock:
            self._stage.close(session)

    def memory(self) -> Memory:
        return self._stage.memory()

    def shutdown(self) -> None:
        self._queue.put(None)
        self._thread.join(10)
        self._stage.shutdown()


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[tuple[TextEngine, TextEngine, LateStage]]:
    checkpoint = write_toy_checkpoint(tmp_path / "toy")
    backend = ToyTextBackend()
    info = backend.describe(checkpoint, LoadOptions())
    layers = [layer.name for layer in info.layers]
    plain = LocalStage("master", backend.load(checkpoint, info, layers, LoadOptions()))
    late = LateStage(backend.load(checkpoint, info, layers, LoadOptions()))
    tokenizer = backend.tokenizer(checkpoint)
    one = TextEngine(info, tokenizer, Pipeline([plain]))
    two = TextEngine(info, tokenizer, Pipeline([LocalStage("master", late)]))
    yield one, two, late
    one.close()
    two.close()
    plain.shutdown()
    late.shutdown()


def tokens_of(engine: TextEngine, request: TextRequest) -> list[int]:
    return [event.token for event in engine.generate(request) if isinstance(event, TokenEvent)]


def test_running_ahead_gives_the_same_tokens(engines: tuple[TextEngine, TextEngine, LateStage]) -> None:
    plain, ahead, stage = engines
    requests = [
        TextRequest(tuple(range(1, 20 + i)), SamplingParams(seed=i, temperature=float(i % 2)), max_tokens=40, stop_ids=stops)
        for i in range(8)
        for stops in (frozenset[int](), frozenset({ord("e"), ord("a")}))
    ]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda request: tokens_of(ahead, request), requests))
    assert found == [tokens_of(plain, request) for request in requests]
    assert stage.ahead > 100
    assert ahead.stats().running == 0


def test_what_needs_the_history_does_not_run_ahead(engines: tuple[TextEngine, TextEngine, LateStage]) -> None:
    plain, ahead, stage = engines
    for request in (
        TextRequest((1, 2, 3), SamplingParams(repeat_penalty=1.3, repeat_last_n=-1, seed=5), max_tokens=30),
        TextRequest((1, 2, 3), SamplingParams(seed=5), max_tokens=30, logprobs=1),
    ):
        assert tokens_of(ahead, request) == tokens_of(plain, request)
    assert stage.ahead == 0


def test_one_position_more_than_needed_at_most(engines: tuple[TextEngine, TextEngine, LateStage]) -> None:
    _, ahead, _ = engines
    request = TextRequest((1, 2, 3, 4), SamplingParams(seed=1), max_tokens=25, ignore_eos=True)
    assert len(tokens_of(ahead, request)) == 25
    assert ahead.stats().positions == 4 + 25 - 1
