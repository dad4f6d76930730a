"""A node killed, frozen, cut off or talking nonsense at every token of an answer: the same text when it returns, a typed
error soon when it does not, no hang, and nothing left anywhere."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
from tests.core.fault_rig import KINDS, Fault, FaultyCluster, Kind
from tests.core.test_chain import cut
from tests.core.test_engine import plain_loop, prompt_of
from tests.core.test_worker import wait_for

from cake_core.checkpoint import Checkpoint
from cake_core.engine.scheduler import Limits
from cake_core.errors import NodeError
from cake_core.events import Failed, Finished, TextEvent, TokenEvent
from cake_core.links.link import LinkTiming
from cake_core.requests import SamplingParams, TextRequest
from cake_core.runtime import TextRuntime
from cake_core.testing.memory import MemoryTransport
from cake_core.testing.toys import write_toy_checkpoint

TOKENS = 24
Check = Callable[[Checkpoint, int, str, list[int], int], None]
REQUEST = TextRequest(prompt_of(9), SamplingParams(seed=5, temperature=0.9), max_tokens=TOKENS, ignore_eos=True)
STAGES = {2: cut(2, whole=True), 3: cut(1, 3)}
CERTAIN = LinkTiming(heartbeat=0.1, dead=1.0, request=10.0)
"""Nobody is given up, for good, because the machine is busy."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy") / "toy")


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> list[int]:
    return plain_loop(checkpoint, REQUEST.prompt, REQUEST.sampling, TOKENS)


def answer(runtime: TextRuntime, within: float = 10.0) -> tuple[list[int], TextEvent]:
    """The ids of an answer and its last event, which must come."""
    events: queue.SimpleQueue[TextEvent] = queue.SimpleQueue()
    runtime.engine.submit(REQUEST, lambda batch: [events.put(event) for event in batch] and None)
    until, ids = time.monotonic() + within, list[int]()
    while True:
        event = events.get(timeout=max(0.0, until - time.monotonic()))
        if isinstance(event, TokenEvent):
            ids.append(event.token)
        elif isinstance(event, Finished | Failed):
            return ids, event


def sample(cluster: FaultyCluster, kinds: Sequence[Kind], every: int) -> Iterator[tuple[int, Kind, str, bool]]:
    """Each index, with one in `every` of what may happen there, another one at the next."""
    cases = list(product(kinds, cluster.workers, (False, True)))
    for index in range(TOKENS):
        yield from ((index, *case) for i, case in enumerate(cases) if (i + 5 * index) % every == 0)


def thaw(cluster: FaultyCluster, runtime: TextRuntime) -> None:
    """The frozen node goes on once the master has given it up."""
    if cluster.saboteur.happened.wait(10) and cluster.saboteur.gone:
        wait_for(lambda: any(status.state == "down" for status in runtime.nodes()))
        cluster.saboteur.heal()


def opened(cluster: FaultyCluster, route: str, rejoin: float) -> TextRuntime:
    return cluster.open_text(route=route, limits=Limits(prefixes=0), rejoin=rejoin)


def is_whole(runtime: TextRuntime, route: str) -> bool:
    """Whether batches still go as they were meant to: a chain that lost a hop is a star from there on."""
    return route == "star" or "w0 -> w1" in str(runtime.pipeline.route())


def check_recovery(checkpoint: Checkpoint, stages: int, route: str, expected: list[int], every: int) -> None:
    with FaultyCluster(checkpoint, MemoryTransport(), STAGES[stages]) as cluster:
        runtime = opened(cluster, route, rejoin=8.0)
        for index, kind, node, answers in sample(cluster, KINDS, every):
            if not is_whole(runtime, route):
                runtime.close()
                runtime = opened(cluster, route, rejoin=8.0)
            case = f"{kind} {node} at {index} {'answering' if answers else 'asked'} over {runtime.pipeline.route()}"
            cluster.saboteur.arm(Fault(kind, node, index, answers))
            helper = threading.Thread(target=thaw, args=(cluster, runtime))
            helper.start()
            found, last = answer(runtime)
            assert cluster.saboteur.happened.is_set(), case
            helper.join()
            assert (found, type(last)) == (expected, Finished), case
            assert isinstance(last, Finished)
            assert last.usage.completion_tokens == TOKENS
            cluster.check_nothing_is_left(runtime)


def check_end(checkpoint: Checkpoint, stages: int, route: str, expected: list[int], every: int) -> None:
    with FaultyCluster(checkpoint, MemoryTransport(), STAGES[stages], CERTAIN) as cluster:
        runtime = opened(cluster, route, rejoin=0.2)
        for index, kind, node, answers in sample(cluster, ("killed", "frozen"), every):
            cluster.saboteur.arm(Fault(kind, node, index, answers, stays=True))
            found, last = answer(runtime)
            assert found == expected[:index]
            assert isinstance(last, Failed)
            assert isinstance(last.error, NodeError)
            assert node in str(last.error)
            assert last.usage.completion_tokens == index
            cluster.check_nothing_is_left(runtime)
            cluster.saboteur.heal()
            wait_for(lambda: all(status.state == "up" for status in runtime.nodes()))


@pytest.mark.parametrize(("stages", "route"), [(2, "star"), (3, "chain")])
def test_the_same_text_when_the_node_is_back(stages: int, route: str, checkpoint: Checkpoint, expected: list[int]) -> None:
    check_recovery(checkpoint, stages, route, expected, every=8 * stages)


@pytest.mark.parametrize(("stages", "route"), [(3, "star"), (2, "chain")])
def test_a_typed_error_when_it_stays_away(stages: int, route: str, checkpoint: Checkpoint, expected: list[int]) -> None:
    check_end(checkpoint, stages, route, expected, every=24 * stages)


ALL = os.environ.get("CAKE_TEST_FAULTS") == "all"
"""Every kind at every token on every node, asked and answering: 1,920 faults that are over (89 s), and 960 that stay."""


@pytest.mark.full
@pytest.mark.timeout(3600 if ALL else 300)
@pytest.mark.parametrize(("check", "every"), [(check_recovery, 1 if ALL else 4), (check_end, 1 if ALL else 6)])
def test_every_fault_at_every_token(check: Check, every: int, checkpoint: Checkpoint, expected: list[int]) -> None:
    """All four beside one another: they mostly wait for clocks."""
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(check, checkpoint, *case, expected, every) for case in product(STAGES, ("star", "chain"))]
        for run in runs:
            run.result()
