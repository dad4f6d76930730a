"""Workers that hand over to one another: the same ids as through the master, in fewer messages, by nobody but whom it sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from tests.core.test_engine import ids, plain_loop, prompt_of, request_for
from tests.core.test_worker import refuse, wait_for

from cake_core.checkpoint import Checkpoint
from cake_core.errors import CakeError, NodeError, NodeUnreachable, StageError
from cake_core.events import TextEvent, TokenEvent
from cake_core.links.link import Link, LinkTiming
from cake_core.model import SAMPLE, Batch, Pending, Row, SessionSpec, Tensor, int32_tensor, int32_values
from cake_core.plugins import Plugins
from cake_core.requests import SamplingParams, TextRequest
from cake_core.runtime import TextRuntime
from cake_core.testing.cluster import LocalCluster
from cake_core.testing.memory import MemoryTransport
from cake_core.testing.toys import write_toy_checkpoint
from cake_core.transport import Address, Channel
from cake_core.wire.codec import spec_to_fields
from cake_core.wire.protocol import CHAINED, Type

Layers = dict[str, list[str]]
EMBED, HEAD = "model.embed_tokens", ["model.norm", "lm_head"]
QUIET = LinkTiming(heartbeat=60.0, dead=120.0, request=120.0)
"""No signs of life between the messages that are counted."""


def cut(*edges: int, whole: bool = False) -> Layers:
    """The four layers of the toy cut at `edges`, a worker each; `whole`: with what else there is on the first and last."""
    runs = [[f"model.layers.{i}" for i in range(a, b)] for a, b in pairwise([0, *edges, 4])]
    if whole:
        runs = [[EMBED, *runs[0]], *runs[1:-1], [*runs[-1], *HEAD]]
    return {f"w{index}": run for index, run in enumerate(runs)}


CUTS = [cut(*edges, whole=whole) for count in (1, 2, 3) for edges in combinations((1, 2, 3), count) for whole in (False, True)]


class PeerlessCluster(LocalCluster):
    """Workers that cannot reach one another, as behind a firewall."""

    def dial_peer(self, name: str, address: Address, timeout: float) -> Channel:
        raise NodeUnreachable(f"nobody answers at {address}")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return write_toy_checkpoint(tmp_path / "toy")


Make = Callable[..., LocalCluster]


@pytest.fixture
def make(checkpoint: Checkpoint) -> Iterator[Make]:
    made: list[LocalCluster] = []

    def cluster(layers: Layers, kind: type[LocalCluster] = LocalCluster, **options: LinkTiming) -> LocalCluster:
        made.append(kind(Plugins(entries=()), checkpoint, MemoryTransport(), layers, **options))
        return made[-1]

    yield cluster
    for one in made:
        one.close()
        assert all(worker.sessions == 0 for worker in one.workers.values())


def route_of(runtime: TextRuntime) -> str:
    return str(runtime.pipeline.route())


def expected_of(checkpoint: Checkpoint, request: TextRequest) -> list[int]:
    return plain_loop(checkpoint, request.prompt, request.sampling, request.max_tokens or 0)


def streams(runtime: TextRuntime, requests: list[TextRequest]) -> list[list[int]]:
    """The ids of all of them, asked for at once."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(partial(ids, runtime), requests))


@pytest.mark.parametrize("layers", CUTS, ids=lambda layers: "|".join(",".join(run) for run in layers.values()))
def test_sixteen_streams_have_the_same_ids_by_either_way(layers: Layers, checkpoint: Checkpoint, make: Make) -> None:
    cluster = make(layers)
    requests = [request_for(i) for i in range(16)]
    expected = [expected_of(checkpoint, request) for request in requests]
    for way, route in (("chain", " -> ".join(layers)), ("star", ", ".join(layers))):
        runtime = cluster.open_text(route=way)
        assert route in route_of(runtime)
        assert streams(runtime, requests) == expected
        runtime.close()


@pytest.mark.parametrize(
    ("layers", "route"),
    [
        ({"w0": ["model.layers.0", "model.layers.2"], "w1": ["model.layers.1", "model.layers.3"]}, "w0 -> w1 -> w0 -> w1"),
        ({"w0": ["model.layers.0-1"], "w1": ["model.layers.3"]}, "w0, master, w1"),
        ({"w0": ["model.layers.0"], "w1": ["model.layers.1"], "w2": ["model.layers.3"]}, "w0 -> w1, master, w2"),
    ],
    ids=["twice the same workers", "the master between", "a chain and a star"],
)
def test_other_shapes(layers: Layers, route: str, checkpoint: Checkpoint, make: Make) -> None:
    runtime = make(layers).open_text()
    assert route in route_of(runtime)
    requests = [request_for(i) for i in range(6)]
    assert streams(runtime, requests) == [expected_of(checkpoint, request) for request in requests]


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_a_token_takes_one_message_more_than_there_are_workers(workers: int, make: Make) -> None:
    cluster = make(cut(*range(1, workers)), timing=QUIET)
    counted = {way: messages_a_token(cluster, way) for way in ("chain", "star")}
    assert counted == {"chain": workers + 1, "star": 2 * workers}


def messages_a_token(cluster: LocalCluster, route: str) -> float:
    """Everything that any process sends while ten more tokens are drawn."""
    runtime = cluster.open_text(route=route)

    def sent(tokens: int) -> int:
        before = total(cluster, runtime)
        ids(runtime, TextRequest(prompt_of(4), max_tokens=tokens, ignore_eos=True))
        wait_for(lambda: not runtime.engine.stats().running)
        return total(cluster, runtime) - before

    sent(20)  # later ones may start from what this one leaves behind
    counted = (sent(40) - sent(30)) / 10
    runtime.close()
    return counted


def total(cluster: LocalCluster, runtime: TextRuntime) -> int:
    masters = [status.count.sent for status in runtime.nodes() if status.count is not None]
    guests = [guest for worker in cluster.workers.values() for guest in worker._guests]
    hops = [hop._link.count.sent for guest in guests for hop in guest.hops._next.values() if hop._link]
    return sum(masters) + sum(hops) + sum(guest.link.count.sent for guest in guests)


def test_workers_that_cannot_reach_one_another_answer_the_master(checkpoint: Checkpoint, make: Make) -> None:
    cluster = make(cut(2), PeerlessCluster)
    runtime = cluster.open_text()
    assert "w0, w1" in route_of(runtime)
    request = request_for(3)
    assert ids(runtime, request) == expected_of(checkpoint, request)
    with pytest.raises(NodeUnreachable, match="w0 cannot hand over to w1"):
        cluster.open_text(route="chain")


def test_a_chain_that_loses_a_hop_goes_on_as_a_star(checkpoint: Checkpoint, make: Make) -> None:
    cluster = make(cut(1, 2, 3))
    runtime = cluster.open_text()
    assert "w0 -> w1 -> w2 -> w3" in route_of(runtime)
    request = request_for(6)
    events: list[TextEvent] = []
    for event in runtime.engine.generate(request):
        events.append(event)
        if sum(isinstance(event, TokenEvent) for event in events) == 5 and isinstance(event, TokenEvent):
            cut_hop(cluster, "w1")
    found = [event.token for event in events if isinstance(event, TokenEvent)]
    assert found == expected_of(checkpoint, request)
    assert "w0 -> w1, w2 -> w3" in route_of(runtime)
    assert ids(runtime, request_for(3))  # and so does what follows


def cut_hop(cluster: LocalCluster, name: str) -> None:
    """Aborts the channel between a worker and the next, and nothing else."""
    for guest in cluster.workers[name]._guests:
        for hop in guest.hops._next.values():
            assert hop._link is not None
            hop._link.channel.abort()


# Who may hand over


class Bare:
    """Links to the second of two workers as a master and as the worker before it have them."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.links: list[Link] = []
        self.master = self.link()
        layers = ["model.layers.2", "model.layers.3", *HEAD]
        self.master.ask(Type.ATTACH, {"model_type": "text", "stages": [layers]}).result(5)
        self.open(self.master, 1)

    def link(self) -> Link:
        channel = self.cluster.dial(self.cluster.addresses["w1"], 5.0)
        self.links.append(Link(channel, "w1", refuse, lambda link, error: None))
        self.links[-1].start()
        return self.links[-1]

    def open(self, link: Link, session: int) -> None:
        fields = {"session": session, "spec": spec_to_fields(SessionSpec(SamplingParams())), "parent": None, "length": 0}
        link.ask(Type.OPEN, fields).result(5)

    def expect(self, ticket: bytes) -> None:
        self.master.ask(Type.EXPECT, {"ticket": ticket}).result(5)

    def peer(self, ticket: bytes) -> Link:
        link = self.link()
        link.ask(Type.PEER, {"ticket": ticket}).result(5)
        return link

    def awaited(self, number: int, batch: Batch) -> Pending:
        pending = Pending()
        self.master.expect(CHAINED | number, pending, batch)
        return pending


def batch_for(session: int, position: int = 0) -> Batch:
    hidden = Tensor("f32", (1, 8), bytes(32))
    return Batch((Row(session, position, 1, SAMPLE),), {"hidden": hidden, "tokens": int32_tensor([3])})


@pytest.fixture
def bare(make: Make) -> Iterator[Bare]:
    made = Bare(make(cut(2, whole=True)))
    yield made
    for link in made.links:
        link.close()
        link.join()


def test_the_right_ticket_reaches_the_masters_session_and_the_answer_goes_to_the_master(bare: Bare) -> None:
    bare.expect(b"t" * 16)
    peer = bare.peer(b"t" * 16)
    batch = batch_for(1)
    pending = bare.awaited(7, batch)
    peer.send_batch(CHAINED | 7, batch, 0)
    assert len(int32_values(pending.result(5).tensors["tokens"])) == 1
    again = bare.awaited(8, batch)
    peer.send_batch(CHAINED | 8, batch, 0)
    with pytest.raises(StageError):  # the same position once more: lost or doubled is an error, told to the master
        again.result(5)
    closed = bare.awaited(9, batch_for(2))
    peer.send_batch(CHAINED | 9, batch_for(2), 0)
    with pytest.raises(StageError, match="not open"):
        closed.result(5)
    assert peer.up


@pytest.mark.parametrize("ticket", [b"u" * 16, b"", b"t" * 15], ids=["another", "none", "short"])
def test_a_forged_ticket_is_refused(bare: Bare, ticket: bytes) -> None:
    bare.expect(b"t" * 16)
    with pytest.raises(StageError, match="expects nobody"):
        bare.peer(ticket)


def test_a_ticket_is_good_once_and_until_the_next_is_given(bare: Bare) -> None:
    bare.expect(b"t" * 16)
    bare.expect(b"v" * 16)
    with pytest.raises(StageError):
        bare.peer(b"t" * 16)
    peer = bare.peer(b"v" * 16)
    with pytest.raises(StageError):
        bare.peer(b"v" * 16)
    bare.expect(b"w" * 16)  # who held the former is turned out
    wait_for(lambda: not peer.up)


def test_a_ticket_does_not_outlive_its_master_nor_reach_anothers_sessions(bare: Bare) -> None:
    bare.expect(b"t" * 16)
    peer = bare.peer(b"t" * 16)
    other = Bare(bare.cluster)
    other.open(other.master, 5)
    pending = bare.awaited(7, batch_for(5))
    peer.send_batch(CHAINED | 7, batch_for(5), 0)
    with pytest.raises(StageError, match="session 5 is not open"):
        pending.result(5)
    bare.expect(b"u" * 16)
    bare.master.close()
    wait_for(lambda: not peer.up)
    with pytest.raises(CakeError):
        bare.peer(b"u" * 16)
    for link in other.links:
        link.close()
        link.join()


@pytest.mark.parametrize("case", ["another stage", "not of a chain", "control"])
def test_a_hand_over_brings_batches_of_its_stage_and_nothing_else(bare: Bare, case: str) -> None:
    bare.expect(b"t" * 16)
    peer = bare.peer(b"t" * 16)
    if case == "control":
        with pytest.raises(CakeError):
            peer.ask(Type.STATUS).result(5)
    else:
        peer.send_batch(7 if case == "not of a chain" else CHAINED | 7, batch_for(1), 1 if case == "another stage" else 0)
    wait_for(lambda: not peer.up)
    bare.open(bare.master, 9)  # the master's own link is none the worse


def test_a_batch_that_should_go_on_without_a_next_worker_is_told_to_the_master(bare: Bare) -> None:
    pending, batch = Pending(), batch_for(1)
    bare.master.expect(CHAINED | 3, pending, batch)
    bare.master.send_batch(CHAINED | 3, batch, 0, hops=1)
    with pytest.raises(NodeError, match="no next worker"):
        pending.result(5)
