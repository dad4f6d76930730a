"""A node is lost for good, and its layers go elsewhere: the text stays the same, and nobody has to restart anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.core.farm import Farm, describe

from cake_core.checkpoint import Checkpoint
from cake_core.cluster.replan import give_away
from cake_core.engine.speculation import Speculation
from cake_core.errors import CapacityError, NodeLost
from cake_core.events import TokenEvent
from cake_core.profiles import DeviceProfile, NodeProfile
from cake_core.requests import TextRequest
from cake_core.runtime import RunSpec, TextRuntime, open_text
from cake_core.testing.cluster import FAST
from cake_core.testing.toys import write_toy_checkpoint
from cake_core.topology import MASTER, Node, Topology

pytestmark = pytest.mark.usefixtures("soon_lost")
FRONT = ("model.layers.0", "model.layers.1", "model.layers.2")
BACK = ("model.layers.3", "model.layers.4", "model.layers.5")
ASKED = TextRequest((1, 2, 3), max_tokens=24, ignore_eos=True)
DESK = NodeProfile(MASTER, (DeviceProfile("cpu", 1 << 30, 1e10),))
FULL = replace(DESK, devices=(DeviceProfile("cpu", 10, 1e10),))


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    return write_toy_checkpoint(tmp_path / "model", layers=6, seconds_per_batch=0.01)


def open_cluster(
    farm: Farm, model: Checkpoint, spares: tuple[str, ...] = (), profile: NodeProfile = FULL, **changes: Any
) -> TextRuntime:
    nodes = (Node("a", farm.address("a"), FRONT), Node("b", farm.address("b"), BACK))
    spec = RunSpec(
        model, Topology(nodes), dial=farm.dial, timing=FAST, wait=5, rejoin=60.0, on_loss="replan",
        spares=tuple(Node(name, farm.address(name), ()) for name in spares), profile=lambda backend: profile,
    )  # fmt: skip
    return open_text(farm.plugins, replace(spec, **changes))


def tokens(runtime: TextRuntime, farm: Farm | None = None, at: int = -1, lose: str = "") -> list[int]:
    """The answer; at token `at` the worker `lose` is ended and its listener with it."""
    found: list[int] = []
    for event in runtime.engine.generate(ASKED):
        if isinstance(event, TokenEvent):
            if len(found) == at and farm is not None:
                farm.end(lose)
            found.append(event.token)
    return found


@pytest.fixture
def alone(farm: Farm, model: Checkpoint) -> list[int]:
    runtime = open_text(farm.plugins, RunSpec(model, Topology()))
    try:
        return tokens(runtime)
    finally:
        runtime.close()


@pytest.mark.parametrize("at", [0, 11, 23])
def test_another_worker_takes_over_and_the_text_is_the_same(farm: Farm, model: Checkpoint, alone: list[int], at: int) -> None:
    farm.start("a")
    farm.start("b")
    runtime = open_cluster(farm, model)
    try:
        assert tokens(runtime, farm, at, "b") == alone
        if at < 23:
            assert runtime.placement.nodes == (MASTER, "a")
            assert runtime.missing() is None
        assert tokens(runtime) == alone, "new requests need no restart"
        assert farm.workers["a"].sessions <= 2
    finally:
        runtime.close()


def test_a_spare_worker_takes_over(farm: Farm, model: Checkpoint, alone: list[int]) -> None:
    farm.start("a", memory=10)
    farm.start("b")
    farm.start("spare")
    runtime = open_cluster(farm, model, spares=("spare",))
    try:
        assert tokens(runtime, farm, 5, "b") == alone
        assert runtime.placement.layers_of("spare") == BACK
        assert [status.name for status in runtime.nodes()] == ["a", "spare"]
    finally:
        runtime.close()


def test_the_master_takes_over(farm: Farm, model: Checkpoint, alone: list[int]) -> None:
    farm.start("a", memory=10)
    farm.start("b")
    runtime = open_cluster(farm, model, profile=DESK)
    try:
        assert tokens(runtime, farm, 5, "a") == alone
        assert runtime.placement.layers_of("b") == BACK
        assert tokens(runtime, farm, 5, "b") == alone
        assert runtime.placement.nodes == (MASTER,)
        assert tokens(runtime) == alone
    finally:
        runtime.close()


def test_a_draft_model_is_not_taken_for_a_part_of_the_model(farm: Farm, model: Checkpoint, alone: list[int]) -> None:
    """It has the same layers, and these are loaded."""
    farm.start("a", memory=10)
    farm.start("b")
    runtime = open_cluster(farm, model, profile=DESK, draft=model, speculation=Speculation(2, everywhere=True))
    try:
        assert tokens(runtime, farm, 5, "b") == alone
        assert [span.node for span in runtime.placement.spans] == [MASTER, "a", MASTER]
        sizes = [memory.weights for memory in runtime.memory()]
        assert len(sizes) == 4, "the beginning, what came, the end, the draft model"
        assert sizes[-1] == max(sizes)
    finally:
        runtime.close()


def test_without_memory_to_spare_it_waits_and_then_says_so(farm: Farm, model: Checkpoint) -> None:
    farm.start("a", memory=10)
    farm.start("b")
    runtime = open_cluster(farm, model, rejoin=1.0)
    try:
        with pytest.raises(NodeLost, match="b"):
            tokens(runtime, farm, 5, "b")
    finally:
        runtime.close()


def test_layers_are_given_away_in_runs(model: Checkpoint) -> None:
    info = describe(model)
    size = info.layer("model.layers.3").nbytes
    given = Topology((Node("a", None, FRONT), Node("b", None, BACK)), "t.yml")
    new = give_away(info, given, ["b"], {"a": size, MASTER: 0, "c": 2 * size}, 0)
    assert new == Topology((Node("a", None, (*FRONT, BACK[2])), Node("c", None, BACK[:2])), "t.yml")
    assert give_away(info, given, ["b"], {MASTER: 9 * size}, 0) == Topology((Node("a", None, FRONT),), "t.yml")
    for room in ({}, {"a": size}):
        with pytest.raises(CapacityError, match="the layers of b take"):
            give_away(info, given, ["b"], room, 0)
