"""The engine against the plain loop: same ids whatever is batched, chunked, cut over nodes, preempted or lost."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from cake_core.checkpoint import Checkpoint
from cake_core.engine.scheduler import Limits
from cake_core.errors import (
    CapacityError,
    ContextLengthError,
    NodeLost,
    NodeMismatch,
    NodeUnreachable,
    QueueFullError,
    RequestError,
    TransportError,
)
from cake_core.events import Embedding, Failed, Finished, PromptDone, TextEvent, TokenEvent
from cake_core.model import SAMPLE, Batch, LoadOptions, Row, SessionSpec, TextBackend, int32_tensor, int32_values
from cake_core.plugins import Plugins
from cake_core.requests import SamplingParams, TextRequest
from cake_core.runtime import RunSpec, TextRuntime, open_text
from cake_core.testing.cluster import LocalCluster
from cake_core.testing.toys import ToyTextBackend, write_toy_checkpoint
from cake_core.topology import Topology
from cake_core.transport import Transport

Cut = dict[str, list[str]]
MakeCluster = Callable[[Cut], LocalCluster]

TAIL = ["model.layers.3", "model.norm", "lm_head"]
CUTS: list[Cut] = [
    {},
    {"w0": ["model.layers.0-3"]},
    {"w0": ["model.layers.0-1"], "w1": ["model.layers.2-3"]},
    {
        "w0": ["model.embed_tokens", "model.layers.0"],
        "w1": ["model.layers.1-2"],
        "w2": ["model.layers.3", "model.norm", "lm_head"],
    },
    {"w0": ["model.layers.0", "model.layers.2"], "w1": ["model.layers.1", "model.layers.3"]},
    {
        "w0": ["model.layers.0"],
        "w1": ["model.layers.1"],
        "w2": ["model.layers.2"],
        "w3": ["model.layers.3", "model.norm", "lm_head"],
    },
]


@pytest.fixture
def plugins() -> Plugins:
    return Plugins(entries=())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return write_toy_checkpoint(tmp_path / "toy")


def plain_loop(checkpoint: Checkpoint, prompt: tuple[int, ...], sampling: SamplingParams, count: int) -> list[int]:
    """The oracle: one stage, one sequence, one position at a time."""
    backend: TextBackend = ToyTextBackend()
    info = backend.describe(checkpoint, LoadOptions())
    stage = backend.load(checkpoint, info, [layer.name for layer in info.layers], LoadOptions())
    stage.open(1, SessionSpec(sampling, len(prompt)))
    tokens, drawn = list(prompt), list[int]()
    for position in range(len(prompt) + count - 1):
        want = SAMPLE if position >= len(prompt) - 1 else Row(1, 0, 1).want
        batch = Batch((Row(1, position, 1, want),), {"tokens": int32_tensor([tokens[position]])})
        result = stage.submit(batch).result()
        if "tokens" in result.tensors:
            drawn += int32_values(result.tensors["tokens"])
            tokens = [*prompt, *drawn]
    stage.shutdown()
    return drawn


def ids(runtime: TextRuntime, request: TextRequest) -> list[int]:
    return [event.token for event in runtime.engine.generate(request) if isinstance(event, TokenEvent)]


def ignore(events: Sequence[TextEvent]) -> None:
    """A sink for requests that are refused before it is called."""


def prompt_of(length: int, salt: int = 0) -> tuple[int, ...]:
    return tuple((7 * i + 13 * salt + i * i) % 250 for i in range(length))


def request_for(i: int) -> TextRequest:
    sampling = (
        SamplingParams(temperature=0.0) if i % 3 == 0 else SamplingParams(seed=i, temperature=0.9, top_k=40, repeat_penalty=1.1)
    )
    return TextRequest(prompt_of(5 + 11 * i, i), sampling, max_tokens=20 + i, ignore_eos=True)


@pytest.fixture
def cluster_of(plugins: Plugins, checkpoint: Checkpoint, transport: Transport) -> Iterator[MakeCluster]:
    made: list[LocalCluster] = []

    def make(cut: Cut) -> LocalCluster:
        made.append(LocalCluster(plugins, checkpoint, transport, cut))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "|".join(cut) or "local")
def test_any_cut_gives_the_plain_loops_ids(cut: Cut, checkpoint: Checkpoint, cluster_of: MakeCluster) -> None:
    runtime = cluster_of(cut).open_text(limits=Limits(chunk=16, depth=3))
    requests = [request_for(i) for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda request: ids(runtime, request), requests))
    for request, tokens in zip(requests, found, strict=True):
        assert tokens == plain_loop(checkpoint, request.prompt, request.sampling, request.max_tokens or 0)


def test_work_is_prompt_plus_generated_minus_one(cluster_of: MakeCluster) -> None:
    runtime = cluster_of({"w0": ["model.layers.0-3"]}).open_text()
    request = TextRequest(prompt_of(100), SamplingParams(temperature=0.0), max_tokens=30, ignore_eos=True)
    assert len(ids(runtime, request)) == 30
    assert runtime.engine.stats().positions == 100 + 30 - 1


def test_contiguous_layers_are_one_round_trip_a_token(cluster_of: MakeCluster) -> None:
    runtime = cluster_of({"w0": ["model.layers.0-3"]}).open_text()
    count = runtime.nodes()[0].count
    assert count is not None
    before = count.received
    ids(runtime, TextRequest(prompt_of(10), SamplingParams(temperature=0.0), max_tokens=40, ignore_eos=True))
    answers = count.received - before
    assert 40 <= answers <= 40 + 3  # one OUTPUT a step, and a sign of life or two


def test_preemption_gives_the_same_text(plugins: Plugins, checkpoint: Checkpoint) -> None:
    runtime = open_text(
        plugins, RunSpec(checkpoint, Topology(), LoadOptions(kv_tokens=256), limits=Limits(chunk=32, prefixes=0))
    )
    requests = [TextRequest(prompt_of(40, i), SamplingParams(seed=i), max_tokens=60, ignore_eos=True) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda request: ids(runtime, request), requests))
    assert runtime.engine.stats().preemptions > 0
    assert runtime.engine.stats().kv_tokens_used == 0
    runtime.close()
    for request, tokens in zip(requests, found, strict=True):
        assert tokens == plain_loop(checkpoint, request.prompt, request.sampling, 60)


def test_what_cannot_fit_is_refused_with_numbers(plugins: Plugins, checkpoint: Checkpoint) -> None:
    runtime = open_text(plugins, RunSpec(checkpoint, Topology(), LoadOptions(kv_tokens=64)))
    with pytest.raises(CapacityError, match="64"):
        runtime.engine.submit(TextRequest(prompt_of(100)), ignore)
    with pytest.raises(ContextLengthError, match="4096"):
        runtime.engine.submit(TextRequest(prompt_of(5000)), ignore)
    with pytest.raises(CapacityError, match="kv-tokens"):
        ids(runtime, TextRequest(prompt_of(40), max_tokens=200, ignore_eos=True))
    assert len(ids(runtime, TextRequest(prompt_of(20), max_tokens=5, ignore_eos=True))) == 5
    runtime.close()


@pytest.mark.parametrize("cut", [CUTS[0], CUTS[3]], ids=["local", "three"])
def test_a_shared_prefix_is_forwarded_once(cut: Cut, checkpoint: Checkpoint, cluster_of: MakeCluster) -> None:
    runtime = cluster_of(cut).open_text()
    first = TextRequest(prompt_of(200), SamplingParams(temperature=0.0), max_tokens=10, ignore_eos=True)
    answer = ids(runtime, first)
    # The next turn of a conversation: everything so far, and a little more.
    longer = (*first.prompt, *answer, 5, 6, 7)
    before = runtime.engine.stats().positions
    second = TextRequest(longer, SamplingParams(seed=4), max_tokens=10, ignore_eos=True)
    events = list(runtime.engine.generate(second))
    assert [e.token for e in events if isinstance(e, TokenEvent)] == plain_loop(checkpoint, longer, second.sampling, 10)
    assert runtime.engine.stats().positions - before == len(longer) - 209 + 10 - 1
    usage = events[-1].usage  # type: ignore[union-attr]
    assert usage is not None
    assert usage.cached_tokens == 209


def test_a_running_request_lends_its_prefix(plugins: Plugins, checkpoint: Checkpoint) -> None:
    slow = LoadOptions(extra={"seconds_per_batch": 0.01})
    runtime = open_text(plugins, RunSpec(checkpoint, Topology(), slow))
    stream = runtime.engine.generate(TextRequest(prompt_of(100), SamplingParams(seed=1), max_tokens=500, ignore_eos=True))
    next(event for event in stream if isinstance(event, TokenEvent))
    request = TextRequest((*prompt_of(90), 1, 2, 3), SamplingParams(temperature=0.0), max_tokens=8, ignore_eos=True)
    events = list(runtime.engine.generate(request))
    stream.close()
    runtime.close()
    assert [e.token for e in events if isinstance(e, TokenEvent)] == plain_loop(checkpoint, request.prompt, request.sampling, 8)
    assert events[-1].usage.cached_tokens == 90  # type: ignore[union-attr]


def test_a_backend_that_keeps_nothing_at_truncate_recomputes(plugins: Plugins, tmp_path: Path) -> None:
    checkpoint = write_toy_checkpoint(tmp_path / "recurrent", recurrent=True)
    runtime = open_text(plugins, RunSpec(checkpoint, Topology()))
    for salt in (1, 2):
        request = TextRequest((*prompt_of(60), salt), SamplingParams(seed=salt), max_tokens=8, ignore_eos=True)
        assert ids(runtime, request) == plain_loop(checkpoint, request.prompt, request.sampling, 8)
    runtime.close()


def test_kept_prefixes_give_way(plugins: Plugins, checkpoint: Checkpoint) -> None:
    runtime = open_text(plugins, RunSpec(checkpoint, Topology(), LoadOptions(kv_tokens=256)))
    for salt in range(8):
        request = TextRequest(prompt_of(100, salt), SamplingParams(seed=salt), max_tokens=20, ignore_eos=True)
        assert ids(runtime, request) == plain_loop(checkpoint, request.prompt, request.sampling, 20)
    stats = runtime.engine.stats()
    assert stats.kv_tokens_used <= 256
    assert stats.prefixes >= 1
    assert stats.preemptions == 0
    runtime.close()


def test_unknown_token_is_a_request_error(plugins: Plugins, checkpoint: Checkpoint) -> None:
    runtime = open_text(plugins, RunSpec(checkpoint, Topology()))
    with pytest.raises(RequestError, match="vocabulary"):
        runtime.engine.submit(TextRequest((99999,)), ignore)
    runtime.close()


def test_queue_is_bounded(plugins: Plugins, checkpoint: Checkpoint) -> None:
    slow = LoadOptions(extra={"seconds_per_position": 0.02})
    runtime = open_text(plugins, RunSpec(checkpoint, Topology(), slow, limits=Limits(rows=1, queue=2)))
    ends: queue.SimpleQueue[TextEvent] = queue.SimpleQueue()
    request = TextRequest(prompt_of(3), max_tokens=500)
    for waiting in (0, 1, 2):
        runtime.engine.submit(request, lambda e: ends.put(e[-1]))
        _wait_for(lambda: runtime.engine.stats().waiting == max(0, waiting))  # noqa: B023 - used at once
    with pytest.raises(QueueFullError):
        runtime.engine.submit(request, ignore)
    runtime.close()


def test_cancel_frees_sessions_everywhere(cluster_of: MakeCluster) -> None:
    cluster = cluster_of(CUTS[2])
    runtime = cluster.open_text()
    stream = runtime.engine.generate(TextRequest(prompt_of(30), max_tokens=4000, ignore_eos=True))
    for event in stream:
        if isinstance(event, TokenEvent):
            break
    assert sum(worker.sessions for worker in cluster.workers.values()) == 2
    stream.close()
    _wait_for(lambda: sum(worker.sessions for worker in cluster.workers.values()) == 0)
    assert runtime.engine.stats().running == 0


def test_scores_embeddings_and_logprobs_do_not_depend_on_chunks(plugins: Plugins, checkpoint: Checkpoint) -> None:
    found = []
    for chunk in (7, 512):
        runtime = open_text(plugins, RunSpec(checkpoint, Topology(), limits=Limits(chunk=chunk)))
        request = TextRequest(prompt_of(50), SamplingParams(seed=3), max_tokens=3, logprobs=2, score_prompt=True)
        events = list(runtime.engine.generate(request))
        embedded = list(runtime.engine.generate(TextRequest(prompt_of(50), embed=True)))
        runtime.close()
        done = next(e for e in events if isinstance(e, PromptDone))
        assert done.scores is not None
        assert [s.token for s in done.scores if s] == list(prompt_of(50))[1:]
        assert isinstance(events[-1], Finished)
        tokens = [e for e in events if isinstance(e, TokenEvent)]
        assert all(e.logprob is not None and len(e.logprob.top) == 2 for e in tokens)
        found.append((done.scores, tokens, [e for e in embedded if isinstance(e, Embedding)]))
    assert found[0] == found[1]
    assert len(found[0][2]) == 1


@pytest.mark.parametrize("token_index", [0, 1, 7, 23])
@pytest.mark.parametrize("cut", [CUTS[2], CUTS[5]], ids=["two", "four"])
def test_a_worker_lost_and_back_changes_nothing(
    cut: Cut, token_index: int, checkpoint: Checkpoint, cluster_of: MakeCluster
) -> None:
    cluster = cluster_of(cut)
    runtime = cluster.open_text(rejoin=20.0)
    request = TextRequest(prompt_of(40), SamplingParams(seed=9), max_tokens=24, ignore_eos=True)
    tokens: list[int] = []
    for event in runtime.engine.generate(request):
        if isinstance(event, TokenEvent):
            tokens.append(event.token)
            if len(tokens) == token_index + 1:
                cluster.stop("w1")
                cluster.start("w1")
    assert tokens == plain_loop(checkpoint, request.prompt, request.sampling, 24)


def test_a_worker_that_stays_away_is_a_typed_error_and_later_requests_are_refused_at_once(cluster_of: MakeCluster) -> None:
    cluster = cluster_of(CUTS[2])
    runtime = cluster.open_text(rejoin=0.5)
    stream = runtime.engine.generate(TextRequest(prompt_of(40), max_tokens=4000, ignore_eos=True))
    next(e for e in stream if isinstance(e, TokenEvent))
    cluster.stop("w1")
    with pytest.raises(NodeLost, match="w1"):
        list(stream)
    with pytest.raises(NodeLost, match="w1"):
        runtime.engine.submit(TextRequest(prompt_of(4)), ignore)
    cluster.start("w1")
    _wait_for(lambda: runtime.missing() is None)
    assert len(ids(runtime, TextRequest(prompt_of(4), max_tokens=3, ignore_eos=True))) == 3


def test_other_weights_or_layers_are_named(tmp_path: Path, cluster_of: MakeCluster) -> None:
    cluster = cluster_of(CUTS[1])
    cluster.stop("w0")
    cluster.start("w0", write_toy_checkpoint(tmp_path / "other", seed=1))
    with pytest.raises(NodeMismatch, match=r"w0 .*model\.layers\.0"):
        cluster.open_text()
    cluster.stop("w0")
    with pytest.raises(NodeUnreachable, match="w0"):
        cluster.open_text()


def test_who_hangs_up_before_it_is_ours_is_unreachable_not_lost(cluster_of: MakeCluster) -> None:
    """As a worker that is just ending does: it still takes connections, and closes them."""
    cluster = cluster_of(CUTS[1])
    cluster.stop("w0")
    listener = cluster.listen_again("w0")

    def hang_up() -> None:
        with contextlib.suppress(TransportError):
            while True:
                listener.accept().close()

    thread = threading.Thread(target=hang_up, daemon=True)
    thread.start()
    with pytest.raises(NodeUnreachable, match=r"w0 .*hung up"):
        cluster.open_text()
    listener.close()
    thread.join(10.0)


def test_nobody_waits_for_a_long_prompt(plugins: Plugins, checkpoint: Checkpoint) -> None:
    """Between two tokens of a running stream there is never more than one chunk of a prompt."""
    slow = LoadOptions(extra={"seconds_per_position": 0.0002})
    runtime = open_text(plugins, RunSpec(checkpoint, Topology(), slow, limits=Limits(chunk=64)))
    gaps: list[int] = []
    done = threading.Event()

    def sink(events: Sequence[TextEvent]) -> None:
        for event in events:
            if isinstance(event, TokenEvent):
                gaps.append(runtime.engine.stats().positions)
            if isinstance(event, Finished | Failed):
                done.set()

    runtime.engine.submit(TextRequest(prompt_of(4), max_tokens=60, ignore_eos=True), sink)
    _wait_for(lambda: len(gaps) > 3)
    long = TextRequest(prompt_of(2000), max_tokens=1, ignore_eos=True)
    assert len(ids(runtime, long)) == 1
    assert done.wait(20)
    runtime.close()
    assert max(b - a for a, b in pairwise(gaps)) <= 64 + 1


def _wait_for(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)
