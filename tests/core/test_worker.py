"""A worker against peers that are slow, silent, several, leaving or malicious."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cake_core.errors import CakeError, ChannelClosed, NodeLost, NodeMismatch, ProtocolError, StageError
from cake_core.events import TokenEvent
from cake_core.links.link import Link, LinkTiming
from cake_core.model import SAMPLE, Batch, Row, SessionSpec, Tensor, Want, int32_tensor
from cake_core.plugins import Plugins
from cake_core.requests import SamplingParams, TextRequest
from cake_core.testing.cluster import LocalCluster
from cake_core.testing.toys import write_toy_checkpoint
from cake_core.topology import Topology
from cake_core.transport import Channel, Transport
from cake_core.wire.codec import spec_to_fields
from cake_core.wire.protocol import Message, Type

ALL = ["model.embed_tokens", "model.layers.0-3", "model.norm", "lm_head"]
STAGES = [["model.embed_tokens", *(f"model.layers.{i}" for i in range(4)), "model.norm", "lm_head"]]
TIMING = LinkTiming(heartbeat=0.1, dead=0.6, request=5.0)


@pytest.fixture
def cluster(tmp_path: Path, transport: Transport) -> Iterator[LocalCluster]:
    checkpoint = write_toy_checkpoint(tmp_path / "toy")
    with LocalCluster(Plugins(entries=()), checkpoint, transport, {"w0": ALL}, timing=TIMING) as made:
        yield made


def refuse(link: Link, message: Message, body: memoryview) -> None:
    raise ProtocolError(f"unexpected {message.type.name}")


class Master:
    """A bare link to the worker, attached unless told otherwise."""

    def __init__(self, cluster: LocalCluster, attach: bool = True) -> None:
        self.downs: list[CakeError] = []
        self.channel: Channel = cluster.dial(cluster.addresses["w0"], 5.0)
        self.link = Link(self.channel, "w0", refuse, lambda link, error: self.downs.append(error), TIMING)
        self.link.start()
        if attach:
            self.link.ask(Type.ATTACH, {"model_type": "text", "stages": STAGES}).result(5)

    def open(self, session: int) -> None:
        fields = {"session": session, "spec": spec_to_fields(SessionSpec(SamplingParams())), "parent": None, "length": 0}
        self.link.ask(Type.OPEN, fields).result(5)

    def forward(self, session: int, position: int, tokens: list[int], want: Want = SAMPLE) -> Batch:
        batch = Batch((Row(session, position, len(tokens), want),), {"tokens": int32_tensor(tokens)})
        return self.link.forward(0, batch).result(5)


def wait_for(condition: Callable[[], bool], timeout: float = 5.0) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


def test_nothing_is_served_before_attach(cluster: LocalCluster) -> None:
    master = Master(cluster, attach=False)
    with pytest.raises(StageError, match="attach"):
        master.open(1)
    with pytest.raises(NodeMismatch, match="topology"):
        master.link.ask(Type.ATTACH, {"model_type": "text", "stages": [["model.layers.0"]]}).result(5)
    with pytest.raises(NodeMismatch, match="image"):
        master.link.ask(Type.ATTACH, {"model_type": "image", "stages": STAGES}).result(5)
    master.link.close()


def test_a_lost_or_doubled_batch_is_an_error_and_changes_nothing(cluster: LocalCluster) -> None:
    master = Master(cluster)
    master.open(1)
    master.forward(1, 0, [1, 2, 3])
    with pytest.raises(StageError):
        master.forward(1, 0, [1, 2, 3])
    with pytest.raises(StageError):
        master.forward(1, 4, [5])
    with pytest.raises(StageError):
        master.forward(2, 0, [5])
    assert master.forward(1, 3, [4]).tensors["tokens"].shape == (1,)
    master.link.close()


def test_two_masters_have_their_own_sessions(cluster: LocalCluster) -> None:
    one, two = Master(cluster), Master(cluster)
    one.open(1)
    two.open(1)
    first = one.forward(1, 0, [1, 2, 3])
    second = two.forward(1, 0, [1, 2, 3])
    assert bytes(first.tensors["tokens"].data) == bytes(second.tensors["tokens"].data)
    assert cluster.workers["w0"].sessions == 2
    one.link.close()
    wait_for(lambda: cluster.workers["w0"].sessions == 1)
    two.forward(1, 3, [4])
    two.link.close()
    wait_for(lambda: cluster.workers["w0"].sessions == 0)


@pytest.mark.parametrize(
    ("header", "buffers"),
    [
        (b"\xff" * 40, ()),
        (b"\x07", ()),
        (b"\x08" + bytes(15), ()),
        (b"\x07" + bytes(15), (b"surplus",)),
    ],
    ids=["garbage", "short", "an answer nobody asked for", "a body nobody declared"],
)
def test_malformed_frames_close_the_link_with_a_reason_and_nothing_else(
    cluster: LocalCluster, header: bytes, buffers: tuple[bytes, ...]
) -> None:
    bystander, attacker = Master(cluster), Master(cluster)
    bystander.open(1)
    attacker.channel.send(header, buffers)
    wait_for(lambda: bool(attacker.downs))
    assert isinstance(attacker.downs[0], ChannelClosed)
    bystander.forward(1, 0, [1, 2, 3])
    bystander.link.close()


def test_a_worker_that_ends_waits_for_those_who_are_leaving(cluster: LocalCluster) -> None:
    """Or their threads would close sessions of stages that are gone."""
    worker = cluster.workers["w0"]
    serving = worker.serving
    assert serving is not None
    master = Master(cluster)
    for session in (1, 2):
        master.open(session)
    with serving.stages[0]._lock:  # so that closing them takes as long as we like
        master.link.channel.abort()
        wait_for(lambda: worker.sessions == 0)
        ending = threading.Thread(target=cluster.stop, args=("w0",))
        ending.start()
        ending.join(0.2)
    ending.join(10)
    assert not ending.is_alive()
    assert not worker._guests


def test_requests_a_worker_does_not_serve_are_answered(cluster: LocalCluster) -> None:
    master = Master(cluster)
    call = {"layer": "unet", "method": "x", "image": 1, "scalars": {}, "tensors": [], "constants": [], "ids": {}}
    with pytest.raises(StageError, match="does not serve"):
        master.link.ask(Type.CALL, call).result(5)
    with pytest.raises(StageError, match="no stage 7"):
        master.link.ask(Type.TRUNCATE, {"session": 1, "length": 0}, stage=7).result(5)
    report, _ = master.link.ask(Type.STATUS).result(5)
    assert report.fields["report"]["name"] == "w0"
    master.link.close()


def test_wrong_tensors_are_a_stage_error(cluster: LocalCluster) -> None:
    master = Master(cluster)
    master.open(1)
    batch = Batch((Row(1, 0, 2, SAMPLE),), {"tokens": int32_tensor([1])})
    with pytest.raises(StageError):
        master.link.forward(0, batch).result(5)
    batch = Batch((Row(1, 0, 1, SAMPLE),), {"hidden": Tensor("f32", (1, 8), bytes(32))})
    with pytest.raises(StageError):
        master.link.forward(0, batch).result(5)
    assert master.forward(1, 0, [1]).tensors["tokens"].shape == (1,)
    master.link.close()


def test_a_silent_peer_is_given_up(cluster: LocalCluster) -> None:
    """The other end says nothing at all, as a frozen process does."""
    silent = threading.Event()
    listener = cluster.transport.listen(replace(cluster.addresses["w0"], port=0), None)
    downs: list[CakeError] = []
    dialled = cluster.transport.dial(listener.address, None, 5.0)
    accepted = listener.accept()

    def down(link: Link, error: CakeError) -> None:
        downs.append(error)
        silent.set()

    link = Link(dialled, "silent", refuse, down, TIMING)
    link.start()
    pending = link.forward(0, Batch((), {}))
    with pytest.raises(NodeLost, match="silent"):
        pending.result(5)
    assert silent.wait(5)
    accepted.abort()
    listener.close()


def test_a_busy_worker_is_alive(tmp_path: Path, transport: Transport) -> None:
    """A batch that takes three times the dead time: the worker's signs of life keep the link."""
    checkpoint = write_toy_checkpoint(tmp_path / "slow", seconds_per_batch=2.0)
    with LocalCluster(Plugins(entries=()), checkpoint, transport, {"w0": ALL}, timing=TIMING) as cluster:
        runtime = cluster.open_text()
        events = list(runtime.engine.generate(TextRequest((1, 2, 3), max_tokens=1, ignore_eos=True)))
        assert sum(isinstance(event, TokenEvent) for event in events) == 1


def test_a_draining_worker_lets_requests_finish(cluster: LocalCluster) -> None:
    runtime = cluster.open_text()
    stream = runtime.engine.generate(TextRequest((1, 2, 3), max_tokens=200, ignore_eos=True))
    next(event for event in stream if isinstance(event, TokenEvent))
    worker = cluster.workers.pop("w0")
    ending = threading.Thread(target=worker.shutdown, args=(10.0,))
    ending.start()
    assert sum(isinstance(event, TokenEvent) for event in stream) == 199
    runtime.close()
    ending.join(10)
    assert not ending.is_alive()


def test_kept_prefixes_do_not_hold_up_a_draining_worker(cluster: LocalCluster) -> None:
    runtime = cluster.open_text()
    list(runtime.engine.generate(TextRequest(tuple(range(40)), max_tokens=5, ignore_eos=True)))
    worker = cluster.workers.pop("w0")
    assert worker.sessions == 1  # kept for the next prompt that begins alike
    ending = threading.Thread(target=worker.shutdown, args=(60.0,))
    ending.start()
    ending.join(10)
    assert not ending.is_alive()


def test_a_topology_without_that_node_is_an_error(cluster: LocalCluster, tmp_path: Path) -> None:
    from cake_core.errors import ConfigError, TopologyError
    from cake_core.topology import parse_topology
    from cake_core.worker.worker import Worker, WorkerSpec

    with pytest.raises(TopologyError, match="it has: w0"):
        Worker(cluster.plugins, WorkerSpec(cluster.checkpoint, cluster.topology, "w1"))
    empty = parse_topology({"w0": {"host": "localhost", "layers": []}})
    with pytest.raises(ConfigError, match="no layers"):
        Worker(cluster.plugins, WorkerSpec(cluster.checkpoint, empty, "w0"))
    assert Topology().nodes == ()
