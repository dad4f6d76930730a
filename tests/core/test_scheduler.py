"""What the scheduler's batches take on stages and wires of known speed: by arithmetic, no clock and no thread."""

from __future__ import annotations

import heapq
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from cake_core.detokenize import Detokenizer
from cake_core.engine.ledger import Ledger
from cake_core.engine.limits import CHUNK, PIECE, fitting_limits
from cake_core.engine.scheduler import Limits, Scheduler
from cake_core.engine.sequence import Sequence
from cake_core.engine.step import Step
from cake_core.model import Memory
from cake_core.requests import TextRequest
from cake_core.stages.stage import RemoteStage, Stage


class Silent:
    def step(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


@dataclass(slots=True)
class Line:
    """Servers in a row, stages and wires alike: each takes a batch at a time, `each` seconds a position and `fixed` more, and
    hands it over `latency` later."""

    each: List[float]
    fixed: float = 0.0
    latency: float = 0.0
    free_at: list[float] = field(default_factory=list)

    def through(self, positions: int, now: float) -> float:
        """When a batch that starts now is through."""
        self.free_at = self.free_at or [0.0] * len(self.each)
        for index, each in enumerate(self.each):
            now = max(now, self.free_at[index]) + self.fixed + each * positions
            self.free_at[index] = now
            now += self.latency
        return now


def run(line: Line, limits: Limits, sequences: List[Sequence]) -> dict[int, list[float]]:
    """The engine's loop without threads; the times of each sequence's tokens, by its order."""
    scheduler, now = Scheduler(limits, Ledger(0)), 0.0
    flying: list[tuple[float, int, Step]] = []
    times: dict[int, list[float]] = {s.order: [] for s in sequences}
    for sequence in sequences:
        scheduler.add(sequence)
    launched = 0
    while True:
        while len(flying) < scheduler.most_in_flight:
            scheduler.admit()
            for sequence, _ in scheduler.to_open:
                scheduler.opened(sequence, 0, None)
            scheduler.to_open.clear()
            step = scheduler.next()
            if step is None:
                break
            launched += 1
            heapq.heappush(flying, (line.through(step.positions, now), launched, step))
        if not flying:
            return times
        now, _, step = heapq.heappop(flying)
        scheduler.landed(step)
        for sequence, row in zip(step.sequences, step.rows, strict=True):
            sequence.in_flight -= 1
            sequence.drawing -= row.want.sample
            if row.want.sample:
                sequence.accept(7, None)
                times[sequence.order].append(now)
            if sequence.ended:
                scheduler.remove(sequence)


def sequence(prompt: int, tokens: int, order: int = 0) -> Sequence:
    request = TextRequest((1,) * prompt, max_tokens=tokens, ignore_eos=True)
    return Sequence(request, lambda _: None, Detokenizer(Silent(), (), False), prompt + tokens, order)


def limits_of(nodes: int) -> Limits:
    return Limits(depth=nodes, chunk=CHUNK, piece=PIECE, pieces=8 * nodes, chunks=4 * nodes)


@pytest.mark.parametrize(("nodes", "most"), [(2, 0.6), (4, 0.4), (8, 0.25)])
def test_stages_read_a_prompt_together(nodes: int, most: float) -> None:
    """Time to the first token of 8,192 over equal stages, against one stage with all the layers."""
    (alone,) = run(Line([0.001]), Limits(chunk=CHUNK), [sequence(8192, 1)])[0]
    (together,) = run(Line([0.001 / nodes] * nodes), limits_of(nodes), [sequence(8192, 1)])[0]
    assert alone == pytest.approx(8.192)
    assert 1 / nodes <= together / alone <= most


@pytest.mark.parametrize(("compute", "wire"), [(0.0005, 0.0001), (0.0002, 0.0005), (0.0004, 0.0004)])
def test_wires_and_stages_work_at_once(compute: float, wire: float) -> None:
    """Four nodes, a wire to each and one back, 2,048 positions: at most 1.25 of the larger of compute and one wire."""
    line = Line([wire, compute / 4] * 4 + [wire], latency=0.001)
    (first,) = run(line, limits_of(4), [sequence(2048, 1)])[0]
    assert first <= 1.25 * 2048 * max(compute, wire)


def test_who_decodes_waits_for_no_more_chunks_than_nodes() -> None:
    nodes = 2
    times = run(Line([0.001 / nodes] * nodes), limits_of(nodes), [sequence(16, 40), sequence(8192, 1, 1)])[0]
    gaps = [b - a for a, b in pairwise(times[1:])]
    assert max(gaps) <= nodes * 0.001 * CHUNK


def test_who_comes_to_decode_joins_a_batch() -> None:
    """Prompts that end at different times: batches stay as few as there are nodes, as small ones cost what large ones do."""
    nodes, fixed = 2, 0.01
    sequences = [sequence(PIECE * (1 + order % 5), 60, order) for order in range(32)]
    times = run(Line([0.00001] * nodes, fixed), limits_of(nodes), sequences)
    paces = [(own[-1] - own[29]) / 30 for own in times.values()]
    assert max(paces) < 1.1 * nodes * fixed


def test_a_short_prompt_is_not_cut() -> None:
    line = Line([0.0001])
    run(line, limits_of(4), [sequence(PIECE, 1)])
    assert line.free_at == [pytest.approx(0.0001 * PIECE)]


class Placed:
    runs_ahead = False
    layers = ()

    def __init__(self, node: str, kv_tokens: int) -> None:
        self.node = node
        self._memory = Memory("cpu", "f32", 0, kv_tokens)

    def memory(self) -> Memory:
        return self._memory


class PlacedFar(Placed, RemoteStage):
    pass


@pytest.mark.parametrize(
    ("stages", "depth", "chunks"),
    [
        ([Placed("master", 64)], 1, 0),
        ([Placed("master", 0), PlacedFar("a", 64), Placed("master", 0)], 1, 4),
        ([Placed("master", 64), PlacedFar("a", 64)], 2, 8),
        ([PlacedFar("a", 64), PlacedFar("b", 64), PlacedFar("a", 64)], 2, 8),
    ],
)
def test_as_many_batches_as_nodes_that_compute(stages: list[Stage], depth: int, chunks: int) -> None:
    limits = fitting_limits(stages)
    assert (limits.depth, limits.chunks) == (depth, chunks)
