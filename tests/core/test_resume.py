"""A link that falls for a moment costs the step under way, and nothing else: sessions are kept for the master they belong to,
as long as it may be back and nobody else needs their memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
from tests.core.fault_rig import Fault, FaultyCluster, Kind
from tests.core.test_chain import cut, cut_hop
from tests.core.test_engine import ids, plain_loop, prompt_of, request_for
from tests.core.test_worker import refuse, wait_for

from cake_core.checkpoint import Checkpoint
from cake_core.engine.scheduler import Limits
from cake_core.errors import CapacityError
from cake_core.events import Embedding, PromptDone, TextEvent, TokenEvent
from cake_core.links.link import Link, LinkTiming
from cake_core.model import SAMPLE, Batch, LoadOptions, Row, SessionSpec, int32_tensor
from cake_core.plugins import Plugins
from cake_core.requests import SamplingParams, TextRequest
from cake_core.runtime import TextRuntime
from cake_core.testing.cluster import LocalCluster
from cake_core.testing.memory import MemoryTransport
from cake_core.testing.toys import write_toy_checkpoint
from cake_core.transport import Transport
from cake_core.wire.codec import spec_to_fields
from cake_core.wire.protocol import Type
from cake_core.worker.parking import Parking

TOKENS, PROMPT = 16, 9
WORK = PROMPT + TOKENS - 1
REQUEST = TextRequest(prompt_of(PROMPT), SamplingParams(seed=5, temperature=0.9), max_tokens=TOKENS, ignore_eos=True)
STAGES = {2: cut(2, whole=True), 3: cut(1, 3)}
PATIENT = LinkTiming(heartbeat=5.0, dead=30.0, request=60.0)
"""Links fall where a test says so, and never because the machine is busy."""
NO_PREFIXES = Limits(prefixes=0)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return write_toy_checkpoint(tmp_path / "toy")


Make = Callable[..., FaultyCluster]


@pytest.fixture
def make(checkpoint: Checkpoint, transport: Transport) -> Iterator[Make]:
    made: list[FaultyCluster] = []

    def cluster(layers: dict[str, list[str]]) -> FaultyCluster:
        made.append(FaultyCluster(checkpoint, transport, layers, PATIENT))
        return made[-1]

    yield cluster
    for one in made:
        one.close()
        assert all(worker.sessions == worker.parked == 0 for worker in one.workers.values())


def work(cluster: LocalCluster) -> dict[str, int]:
    """Positions that each worker has computed."""
    found = {}
    for name, worker in cluster.workers.items():
        assert worker.serving is not None
        found[name] = sum(stage.clock.count.positions for stage in worker.serving.stages)
    return found


def done_since(cluster: LocalCluster, before: dict[str, int]) -> dict[str, int]:
    return {name: positions - before[name] for name, positions in work(cluster).items()}


def check_nothing_is_left(cluster: FaultyCluster, runtime: TextRuntime) -> None:
    cluster.check_nothing_is_left(runtime)
    wait_for(lambda: all(worker.parked == 0 for worker in cluster.workers.values()))


@pytest.mark.parametrize(("stages", "route"), list(product(STAGES, ("star", "chain"))))
def test_at_most_the_step_under_way_is_computed_again(stages: int, route: str, checkpoint: Checkpoint, make: Make) -> None:
    expected = plain_loop(checkpoint, REQUEST.prompt, REQUEST.sampling, TOKENS)
    cluster = make(STAGES[stages])
    kinds: tuple[Kind, ...] = ("cut", "killed")
    faults = product(kinds, cluster.workers, (False, True))
    for number, (kind, node, answers) in enumerate(faults):
        runtime = cluster.open_text(route=route, limits=NO_PREFIXES)
        before, index = work(cluster), (0, 1, 7, TOKENS - 1)[number % 4]
        cluster.saboteur.arm(Fault(kind, node, index, answers))
        assert ids(runtime, REQUEST) == expected
        assert cluster.saboteur.happened.is_set()
        again = {name: positions - WORK for name, positions in done_since(cluster, before).items()}
        # A worker of a chain has three links, which may be missed one after another, each with a step under way.
        losses = 1 if route == "star" else 3
        allowed = {n * step for n in range(losses + 1) for step in (1, 1 if index else PROMPT)}
        assert set(again.values()) <= allowed, f"{kind} {node} at {index}, {'answering' if answers else 'asked'}: {again}"
        check_nothing_is_left(cluster, runtime)
        runtime.close()


def test_many_streams_go_on_where_they_were(checkpoint: Checkpoint, make: Make) -> None:
    cluster = make(STAGES[3])
    runtime = cluster.open_text(limits=Limits(prefixes=0, chunk=16, depth=3))
    requests = [request_for(i) for i in range(12)]
    expected = [plain_loop(checkpoint, r.prompt, r.sampling, r.max_tokens or 0) for r in requests]
    before = work(cluster)
    cluster.saboteur.arm(Fault("killed", "w1", 40))
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(lambda request: ids(runtime, request), requests)) == expected
    assert cluster.saboteur.happened.is_set()
    once = sum(len(r.prompt) + (r.max_tokens or 0) - 1 for r in requests)
    # Each sequence has its last step again, and of those that were in their prompts the chunks under way.
    assert max(done_since(cluster, before).values()) <= once + len(requests) + 3 * 16
    check_nothing_is_left(cluster, runtime)


def test_a_lost_hop_costs_no_more(checkpoint: Checkpoint, make: Make) -> None:
    cluster = make(cut(1, 2, 3))
    runtime = cluster.open_text(limits=NO_PREFIXES)
    tokens: list[int] = []
    for event in runtime.engine.generate(REQUEST):
        if isinstance(event, TokenEvent):
            tokens.append(event.token)
            if len(tokens) == 5:
                cut_hop(cluster, "w1")
    assert tokens == plain_loop(checkpoint, REQUEST.prompt, REQUEST.sampling, TOKENS)
    assert "w0 -> w1, w2 -> w3" in str(runtime.pipeline.route())
    assert set(work(cluster).values()) <= {WORK, WORK + 1, WORK + 2}  # both ends may tell of it, one after the other
    check_nothing_is_left(cluster, runtime)


def test_a_restarted_worker_is_another_one(checkpoint: Checkpoint, make: Make) -> None:
    cluster = make(STAGES[2])
    runtime = cluster.open_text(limits=NO_PREFIXES)
    tokens: list[int] = []
    for event in runtime.engine.generate(REQUEST):
        if isinstance(event, TokenEvent):
            tokens.append(event.token)
            if len(tokens) == 6:
                before = work(cluster)["w0"]
                cluster.stop("w1")
                cluster.start("w1")
    assert tokens == plain_loop(checkpoint, REQUEST.prompt, REQUEST.sampling, TOKENS)
    assert work(cluster)["w1"] == WORK
    assert work(cluster)["w0"] - before >= WORK - 1  # and the others compute what it needs again
    check_nothing_is_left(cluster, runtime)


def test_a_backend_that_cannot_go_back_computes_again(tmp_path: Path) -> None:
    checkpoint = write_toy_checkpoint(tmp_path / "recurrent", recurrent=True)
    expected = plain_loop(checkpoint, REQUEST.prompt, REQUEST.sampling, TOKENS)
    cluster = FaultyCluster(checkpoint, MemoryTransport(), STAGES[2], PATIENT)
    runtime = cluster.open_text(limits=NO_PREFIXES)
    for answers in (False, True):
        cluster.saboteur.arm(Fault("cut", "w1", 7, answers))
        assert ids(runtime, REQUEST) == expected
    check_nothing_is_left(cluster, runtime)
    cluster.close()


@pytest.mark.parametrize("index", [0, 3])
def test_scores_and_embeddings_are_whole_after_a_cut(index: int, make: Make) -> None:
    """Of what was lost with the step under way none is missing, and none comes twice."""
    cluster = make(STAGES[2])
    runtime = cluster.open_text(limits=Limits(prefixes=0, chunk=10))
    scoring = TextRequest(prompt_of(50), SamplingParams(seed=3), max_tokens=3, logprobs=1, score_prompt=True)
    embedding = TextRequest(prompt_of(50), embed=True)
    found: list[list[list[TextEvent]]] = []
    for disturbed in (False, True):
        events: list[list[TextEvent]] = []
        for request in (scoring, embedding):
            cluster.saboteur.happened.clear()
            if disturbed:
                cluster.saboteur.arm(Fault("cut", "w1", index, True))
            kinds = PromptDone | TokenEvent | Embedding
            events.append([event for event in runtime.engine.generate(request) if isinstance(event, kinds)])
            assert cluster.saboteur.happened.is_set() is disturbed
        found.append(events)
    assert found[0] == found[1]


def test_what_was_cancelled_meanwhile_is_closed_as_soon_as_the_master_is_back(checkpoint: Checkpoint, make: Make) -> None:
    """Not when the time is over for which sessions are kept; those that are still wanted go on where they were."""
    count = 1000
    request = TextRequest(REQUEST.prompt, REQUEST.sampling, max_tokens=count, ignore_eos=True)
    cluster = make(STAGES[2])
    runtime = cluster.open_text(rejoin=60.0, limits=NO_PREFIXES)
    going, cancelled = (runtime.engine.generate(request) for _ in range(2))
    tokens = [event.token for _ in range(3) if isinstance(event := next(going), TokenEvent)]
    next(cancelled)
    cluster.saboteur.arm(Fault("killed", "w1", 0, stays=True))
    assert cluster.saboteur.happened.wait(30)
    wait_for(lambda: cluster.workers["w1"].parked == 2)
    cancelled.close()
    wait_for(lambda: runtime.engine.stats().running == 1)
    cluster.saboteur.heal()
    wait_for(lambda: (cluster.workers["w1"].sessions, cluster.workers["w1"].parked) == (1, 0), 20.0)
    tokens += [event.token for event in going if isinstance(event, TokenEvent)]
    assert tokens == plain_loop(checkpoint, request.prompt, request.sampling, count)
    check_nothing_is_left(cluster, runtime)


def test_what_nobody_comes_back_for_is_closed(make: Make) -> None:
    cluster = make(STAGES[2])
    runtime = cluster.open_text(rejoin=0.2, limits=NO_PREFIXES)
    cluster.saboteur.arm(Fault("killed", "w1", 4, stays=True))
    with pytest.raises(Exception, match="w1"):
        ids(runtime, REQUEST)
    check_nothing_is_left(cluster, runtime)
    cluster.saboteur.heal()


def test_no_prompt_starts_from_a_prefix_that_is_gone(checkpoint: Checkpoint, make: Make) -> None:
    """A link that fell and came back between two requests, while nobody looked."""
    cluster = make(STAGES[2])
    runtime = cluster.open_text(rejoin=0.2)
    request = TextRequest(prompt_of(60), SamplingParams(temperature=0.0), max_tokens=4, ignore_eos=True)
    expected = plain_loop(checkpoint, request.prompt, request.sampling, 4)
    assert ids(runtime, request) == expected
    wait_for(lambda: runtime.engine.stats().prefixes == 1)
    former = runtime._nodes["w1"].link()
    runtime._nodes._listeners.clear()  # or the engine may be quick enough to see it away
    former.channel.abort()
    wait_for(lambda: runtime.missing() is None and runtime._nodes["w1"].link() is not former)
    wait_for(lambda: all(worker.parked == 0 for worker in cluster.workers.values()))
    for hit in (False, True):
        before = work(cluster)["w1"]
        assert ids(runtime, request) == expected
        assert (work(cluster)["w1"] - before < 60) is hit


# The worker's side

HERE = {"w0": ["model.embed_tokens", "model.layers.0-3", "model.norm", "lm_head"]}
ALL = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(4)), "model.norm", "lm_head"]
KV = 64


class Master:
    """A bare link to the one worker, over which sessions are kept for whoever has the token."""

    def __init__(self, cluster: LocalCluster, token: bytes, keep: float = 30.0) -> None:
        channel = cluster.dial(cluster.addresses["w0"], 5.0)
        self.link = Link(channel, "w0", refuse, lambda link, error: None, PATIENT)
        self.link.start()
        fields = {"model_type": "text", "stages": [ALL], "token": token, "keep": keep}
        self.link.ask(Type.ATTACH, fields).result(5)

    def open(self, session: int, parent: int | None = None, length: int = 0) -> int:
        spec = spec_to_fields(SessionSpec(SamplingParams()))
        fields = {"session": session, "spec": spec, "parent": parent, "length": length}
        return int(self.link.ask(Type.OPEN, fields).result(5)[0].fields["length"])

    def forward(self, session: int, position: int, length: int) -> None:
        rows = (Row(session, position, length, SAMPLE),)
        self.link.forward(0, Batch(rows, {"tokens": int32_tensor([3] * length)})).result(5)

    def cut(self) -> None:
        self.link.channel.abort()
        self.link.join()


@pytest.fixture
def cluster(checkpoint: Checkpoint, transport: Transport) -> Iterator[LocalCluster]:
    options = LoadOptions(kv_tokens=KV)
    with LocalCluster(Plugins(entries=()), checkpoint, transport, HERE, options, PATIENT) as made:
        yield made


def kept(cluster: LocalCluster) -> tuple[int, int]:
    """Sessions open and sessions that wait for their master."""
    return cluster.workers["w0"].sessions, cluster.workers["w0"].parked


def test_only_their_own_master_finds_sessions_again(cluster: LocalCluster) -> None:
    master = Master(cluster, b"a" * 16)
    master.open(7)
    master.forward(7, 0, 10)
    master.open(9)
    master.cut()
    wait_for(lambda: kept(cluster) == (0, 2))
    other = Master(cluster, b"b" * 16)
    assert other.open(1, 7, 10) == 0
    back = Master(cluster, b"a" * 16)
    assert back.open(1, 7, 6) == 6
    back.forward(1, 6, 1)
    for session in (7, 9):
        back.link.tell(Type.CLOSE, {"session": session})
    wait_for(lambda: kept(cluster) == (2, 0))
    other.cut()
    back.cut()


@pytest.mark.parametrize(("token", "keep"), [(b"", 30.0), (b"a" * 15, 30.0), (b"a" * 16, 0.0), (b"a" * 16, -1.0)])
def test_who_leaves_no_token_or_no_time_leaves_nothing(token: bytes, keep: float, cluster: LocalCluster) -> None:
    master = Master(cluster, token, keep)
    master.open(1)
    master.cut()
    wait_for(lambda: kept(cluster) == (0, 0))
    assert Master(cluster, token).open(2, 1, 5) == 0


def test_sessions_are_closed_when_their_time_is_over(cluster: LocalCluster) -> None:
    master = Master(cluster, b"a" * 16, keep=0.05)
    master.open(1)
    master.forward(1, 0, KV)
    master.cut()
    wait_for(lambda: kept(cluster) == (0, 0))
    other = Master(cluster, b"b" * 16)
    other.open(1)
    other.forward(1, 0, KV)


def test_a_master_is_back_before_its_former_link_was_missed(cluster: LocalCluster) -> None:
    master = Master(cluster, b"a" * 16)
    master.open(1)
    master.forward(1, 0, 10)
    back = Master(cluster, b"a" * 16)
    assert back.open(2, 1, 10) == 10
    wait_for(lambda: not master.link.up)
    assert kept(cluster) == (2, 0)


def test_memory_goes_to_who_needs_it(cluster: LocalCluster) -> None:
    gone, other = Master(cluster, b"a" * 16), Master(cluster, b"b" * 16)
    gone.open(1)
    gone.forward(1, 0, KV)
    other.open(1)
    with pytest.raises(CapacityError):  # as long as somebody uses it
        other.forward(1, 0, 20)
    gone.cut()
    wait_for(lambda: kept(cluster) == (1, 1))
    other.forward(1, 0, 20)
    assert kept(cluster) == (1, 0)
    assert Master(cluster, b"a" * 16).open(2, 1, KV) == 0


def test_a_worker_that_ends_keeps_nothing(cluster: LocalCluster) -> None:
    worker = cluster.workers["w0"]
    master = Master(cluster, b"a" * 16)
    master.open(1)
    cluster.stop("w0")
    assert (worker.sessions, worker.parked) == (0, 0)
    wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name == "cake-parking"])


def test_there_is_an_end_to_what_is_kept() -> None:
    class Closing:
        closed: list[int] = []  # noqa: RUF012 - one for the test

        def close(self, session: int) -> None:
            self.closed.append(session)

    parking = Parking([Closing()])  # type: ignore[list-item]
    for first in (0, 3000):
        parking.park(b"%16d" % first, {(0, i): i for i in range(first, first + 3000)}, 30.0)
    assert parking.count == 3000
    assert Closing.closed == list(range(3000))
    assert parking.take(b"%16d" % 3000, (0, 3001)) == 3001
    parking.end()
    parking.park(b"c" * 16, {(0, 1): 1}, 30.0)
    assert parking.count == 0
    assert len(Closing.closed) == 5999
