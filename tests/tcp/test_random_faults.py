"""Faults in a row, as chance has them, over real sockets: every answer is right, and nothing grows.

The schedule is that of `CAKE_TEST_SEED`, or always the same one; a failure says which.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
import threading
import time
from collections import Counter

import pytest
from tests.core.fault_rig import Fault, FaultyCluster, Kind
from tests.core.test_chain import cut
from tests.core.test_engine import plain_loop, prompt_of
from tests.core.test_worker import wait_for

from cake_core.engine.scheduler import Limits
from cake_core.events import TokenEvent
from cake_core.links.link import LinkTiming
from cake_core.requests import SamplingParams, TextRequest
from cake_core.testing.toys import write_toy_checkpoint
from cake_transport_tcp.transport import TcpTransport

SEED = int(os.environ.get("CAKE_TEST_SEED", "20261125"))
BRISK = LinkTiming(heartbeat=0.02, dead=0.25, request=10.0)
STREAMS, TOKENS, PATIENCE = 3, 8, 20.0
KINDS: tuple[Kind, ...] = ("killed", "cut", "garbage") * 6 + ("frozen",)
REQUESTS = [
    TextRequest(prompt_of(5 + 4 * i, i), SamplingParams(seed=i, temperature=0.8), max_tokens=TOKENS, ignore_eos=True)
    for i in range(STREAMS)
]
WATCHED = ("Link", "Guest", "Hop", "Hops", "Route", "Sequence", "Pending", "RemoteStage", "SabotagedChannel")


def used() -> dict[str, int]:
    """What could leak: objects that a link or a request consists of, threads, file descriptors, megabytes."""
    gc.collect()
    counts = Counter(type(item).__name__ for item in gc.get_objects())
    found = {name: counts[name] for name in WATCHED} | {"threads": threading.active_count()}
    if sys.platform == "linux":
        with open("/proc/self/statm") as statm:
            megabytes = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
        found |= {"descriptors": len(os.listdir("/proc/self/fd")), "megabytes": megabytes}
    return found


class Streams:
    """Some requests at once, and what became of them."""

    def __init__(self, runtime):
        self.ids = [[] for _ in REQUESTS]
        self.last = [None] * STREAMS
        self.done = threading.Semaphore(0)
        for which, request in enumerate(REQUESTS):
            runtime.engine.submit(request, lambda events, which=which: self._take(which, events))

    def _take(self, which, events):
        self.ids[which] += [event.token for event in events if isinstance(event, TokenEvent)]
        if type(events[-1]).__name__ in ("Finished", "Failed"):
            self.last[which] = events[-1]
            self.done.release()

    def wait(self):
        return all(self.done.acquire(timeout=PATIENCE) for _ in REQUESTS)


def fault_of(chance: random.Random, cluster: FaultyCluster) -> Fault:
    node = chance.choice(list(cluster.workers))
    return Fault(chance.choice(KINDS), node, chance.randrange(TOKENS), chance.random() < 0.5)


def suffer(runtime, cluster, chance, expected, faults):
    """One fault after another, each with a set of streams."""
    for number in range(faults):
        fault = fault_of(chance, cluster)
        cluster.saboteur.arm(fault)
        streams = Streams(runtime)
        if fault.kind == "frozen" and cluster.saboteur.happened.wait(PATIENCE):
            wait_for(lambda: any(status.state == "down" for status in runtime.nodes()), PATIENCE)
            cluster.saboteur.heal()
        said = f"CAKE_TEST_SEED={SEED}: fault {number}, {fault}, {runtime.nodes()}"
        assert streams.wait(), f"a stream hangs; {said}"
        assert streams.ids == expected, f"{streams.last}; {said}"


def settle(runtime, cluster):
    """Everything at rest, all nodes there."""
    cluster.saboteur.fault = None
    wait_for(lambda: all(status.state == "up" for status in runtime.nodes()), PATIENCE)
    streams = Streams(runtime)
    assert streams.wait()
    cluster.check_nothing_is_left(runtime)


@pytest.fixture
def quiet():
    """Nothing is logged: kept records hold errors, and with them the frames they came through."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("faults", [60, pytest.param(1000, marks=(pytest.mark.full, pytest.mark.timeout(300)))])
def test_random_faults_in_a_row(tmp_path, faults):
    checkpoint = write_toy_checkpoint(tmp_path / "toy")
    expected = [plain_loop(checkpoint, r.prompt, r.sampling, TOKENS) for r in REQUESTS]
    chance = random.Random(SEED)
    with FaultyCluster(checkpoint, TcpTransport(), cut(1, 3), BRISK) as cluster:
        runtime = cluster.open_text(limits=Limits(prefixes=0, depth=2), rejoin=10.0)
        suffer(runtime, cluster, chance, expected, faults // 4)
        settle(runtime, cluster)
        before = used()
        suffer(runtime, cluster, chance, expected, faults - faults // 4)
        settle(runtime, cluster)
        check_growth(before)


def check_growth(before: dict[str, int]) -> None:
    """A link that has just fallen takes a moment to be gone."""
    until = time.monotonic() + 5.0
    while more := grown(before, used()):
        assert time.monotonic() < until, f"CAKE_TEST_SEED={SEED}: grew by {more}"
        time.sleep(0.1)


def grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """What there is more of, beyond what a few links in the middle of ending explain."""
    room = {"megabytes": 8, "Pending": 20}
    return {name: count - before[name] for name, count in after.items() if count > before[name] + room.get(name, 6)}
