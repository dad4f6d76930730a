"""Workers as processes, one of which stops answering in the middle of an answer without a word: SIGSTOP, as of a laptop that
sleeps. Workers have the clock they always have, so a silence is noticed after ten seconds."""

from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cake_core.checkpoint import Checkpoint
from cake_core.cluster.chain import Way
from cake_core.engine.scheduler import Limits
from cake_core.errors import NodeError
from cake_core.events import Failed, Finished, TextEvent, TokenEvent
from cake_core.links.connect import Connector, Keyring
from cake_core.links.link import LinkTiming
from cake_core.plugins import Plugins
from cake_core.requests import SamplingParams, TextRequest
from cake_core.runtime import RunSpec, TextRuntime, open_text
from cake_core.testing.toys import write_toy_checkpoint
from cake_core.topology import load_topology

pytest.importorskip("cake_transport_tcp", reason="workers meet over TCP")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="stops a process"),
]

KEY = "ab" * 32
NOTICED = 3 * 10.0
"""Seconds after which a silence must have been noticed: ten, and what a loaded machine may make of them."""
TOKENS, BEFORE = 24, 6
REQUEST = TextRequest(tuple(range(2, 11)), SamplingParams(seed=5, temperature=0.9), max_tokens=TOKENS, ignore_eos=True)
CUTS = {
    2: ("model.embed_tokens, model.layers.0-1", "model.layers.2-3, model.norm, lm_head"),
    3: ("model.layers.0", "model.layers.1-2", "model.layers.3"),
}
Events = queue.SimpleQueue[TextEvent]


class Rig:
    """Workers `w0`, `w1` ... in a chain, each a process."""

    def __init__(self, spawn: Callable[..., Any], pick: Callable[[], str], home: dict[str, str], folder: Path) -> None:
        self.model: Checkpoint = write_toy_checkpoint(folder / "toy", seconds_per_batch=0.02)
        self.processes: dict[str, Any] = {}
        self._spawn, self._pick, self._folder = spawn, pick, folder
        self._env = {**home, "CAKE_CLUSTER_KEY": KEY}
        self._addresses: dict[str, str] = {}

    def open(self, stages: int, rejoin: float, silence: float = 10.0, route: Way = "chain") -> TextRuntime:
        nodes = {f"w{index}": layers for index, layers in enumerate(CUTS[stages])}
        self._addresses = {name: self._pick() for name in nodes}
        topology = self._folder / "topology.yml"
        entries = [f"{n}:\n  host: '{self._addresses[n]}'\n  layers: [{layers}]\n" for n, layers in nodes.items()]
        topology.write_text("".join(entries))
        for name in nodes:
            self.start(name)
        plugins = Plugins()
        connector = Connector(plugins, Keyring(KEY, self._folder, False, lambda _: None))
        spec = RunSpec(
            self.model, load_topology(topology), dial=connector.dial, wait=60, rejoin=rejoin, route=route,
            limits=Limits(prefixes=0), timing=LinkTiming(dead=silence),
        )  # fmt: skip
        return open_text(plugins, spec)

    def start(self, name: str) -> None:
        where = ["--name", name, "--address", self._addresses[name]]
        command = ["cake", "worker", "--model", "toy", "--topology", "topology.yml", *where]
        self.processes[name] = self._spawn(command, self._env)
        self.processes[name].wait_for("listening on")

    def signal(self, name: str, number: signal.Signals) -> None:
        os.killpg(self.processes[name].popen.pid, number)


@pytest.fixture
def rig(spawn: Callable[..., Any], free_address: Callable[[], str], home: dict[str, str], tmp_path: Path) -> Iterator[Rig]:
    made = Rig(spawn, free_address, home, tmp_path)
    yield made
    for name in made.processes:  # what is stopped does not end in order
        if made.processes[name].popen.poll() is None:
            made.signal(name, signal.SIGCONT)


def drain(events: Events, count: int, within: float) -> tuple[list[int], TextEvent | None]:
    """The next ids, `count` of them or all to the end, and the end, if it has come."""
    until, ids = time.monotonic() + within, list[int]()
    while len(ids) < count:
        event = events.get(timeout=max(0.0, until - time.monotonic()))
        if isinstance(event, TokenEvent):
            ids.append(event.token)
        elif isinstance(event, Finished | Failed):
            return ids, event
    return ids, None


def submit(runtime: TextRuntime) -> Events:
    events: Events = queue.SimpleQueue()
    runtime.engine.submit(REQUEST, lambda batch: [events.put(event) for event in batch] and None)
    return events


def wait_until(condition: Callable[[], bool], within: float) -> float:
    """Seconds until it was so."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + within, "it did not happen in time"
        time.sleep(0.02)
    return time.monotonic() - began


def is_down(runtime: TextRuntime, name: str) -> bool:
    return any(status.name == name and status.state not in ("up", "draining") for status in runtime.nodes())


def holds_nothing(runtime: TextRuntime) -> bool:
    """Whether every node is there and has all of its KV cache free."""
    statuses = runtime.nodes(fresh=True)
    return all(s.state == "up" and all(m.kv_tokens_free == m.kv_tokens for m in s.memory) for s in statuses)


@pytest.mark.parametrize(
    ("stages", "node", "replaced"), [(2, "w1", False), (3, "w1", False), (3, "w0", True)], ids=["of 2", "of 3", "replaced"]
)
def test_a_frozen_worker_changes_no_text(rig: Rig, stages: int, node: str, replaced: bool) -> None:
    with closing(rig.open(stages, rejoin=60.0)) as runtime:
        expected, _ = drain(submit(runtime), TOKENS, 60)
        events = submit(runtime)
        ids, _ = drain(events, BEFORE, 60)
        rig.signal(node, signal.SIGSTOP)
        wait_until(lambda: is_down(runtime, node), NOTICED)
        if replaced:
            rig.signal(node, signal.SIGKILL)
            rig.processes[node].popen.wait(10)
            rig.start(node)
        else:
            rig.signal(node, signal.SIGCONT)
        rest, end = drain(events, 10 * TOKENS, 60)
        assert isinstance(end, Finished), end
        assert ids + rest == expected
        assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (len(REQUEST.prompt), TOKENS)
        wait_until(lambda: holds_nothing(runtime), 30)


def test_a_worker_that_stays_frozen_ends_its_request_with_its_name(rig: Rig) -> None:
    with closing(rig.open(2, rejoin=1.0)) as runtime:
        events = submit(runtime)
        drain(events, BEFORE, 60)
        rig.signal("w0", signal.SIGSTOP)
        _, end = drain(events, 10 * TOKENS, NOTICED + 10)
        assert isinstance(end, Failed), end
        assert isinstance(end.error, NodeError)
        assert "w0" in str(end.error)
        rig.signal("w0", signal.SIGCONT)
        wait_until(lambda: holds_nothing(runtime), 60)
        assert isinstance(drain(submit(runtime), 10 * TOKENS, 60)[1], Finished), "new requests need no restart of anything"


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize(("stages", "route"), [(2, "star"), (3, "chain")])
def test_an_error_comes_within_ten_seconds_where_that_is_wanted(
    rig: Rig, number: signal.Signals, stages: int, route: Way
) -> None:
    """With the settings of docs/operations.md."""
    with closing(rig.open(stages, rejoin=3.0, silence=5.0, route=route)) as runtime:
        events = submit(runtime)
        drain(events, BEFORE, 60)
        rig.signal("w1", number)
        _, end = drain(events, 10 * TOKENS, 10)
        assert isinstance(end, Failed), end
        assert isinstance(end.error, NodeError)
        assert "w1" in str(end.error)
