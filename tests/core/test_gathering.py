"""From bare workers to a topology, and to answers: found at addresses, joined, filled by a file, shared out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.core.farm import Farm, describe

from cake_core.checkpoint import Checkpoint
from cake_core.cli.options import ModelFlags
from cake_core.cluster import gathering
from cake_core.cluster.gathering import Gathered, Search, Wishes, gather, usable
from cake_core.cluster.survey import Surveyed, survey
from cake_core.errors import CapacityError, ConfigError
from cake_core.events import TokenEvent
from cake_core.links.link import LinkTiming
from cake_core.links.reports import read_memory
from cake_core.model import LoadOptions
from cake_core.planners import PlanRequest
from cake_core.profiles import DeviceProfile, LinkProfile, NodeProfile
from cake_core.requests import TextRequest
from cake_core.runtime import RunSpec, open_text
from cake_core.spreading import spread
from cake_core.testing.cluster import FAST, LocalCluster
from cake_core.testing.memory import MemoryTransport
from cake_core.testing.toys import write_toy_checkpoint
from cake_core.topology import MASTER, Node, Topology
from cake_core.transport import Address

DESK = NodeProfile(MASTER, (DeviceProfile("cpu", 1 << 30, 1e10),))


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    return write_toy_checkpoint(tmp_path / "model", layers=6)


class Way:
    """A connector over the farm's network. `waiting` are workers that joined."""

    def __init__(self, farm: Farm, waiting: tuple[str, ...] = ()) -> None:
        self._farm, self.waiting = farm, waiting

    def dial(self, address: Address, timeout: float) -> Any:
        return self._farm.dial(address, timeout)

    def joined(self, name: str, timeout: float) -> Any:
        return self._farm.dial(self._farm.address(name), timeout)

    def joined_again(self, name: str, invite: Any, timeout: float) -> Any:
        return self.joined(name, timeout)

    def arrived(self) -> list[str]:
        return list(self.waiting)


def look(farm: Farm, wishes: Wishes, topology: Topology | None = None, **more: Any) -> tuple[list[Surveyed], list[str]]:
    said: list[str] = []
    found = Search(Way(farm, **more), wishes, topology or Topology()).everybody(said.append)  # type: ignore[arg-type]
    return usable(found, said.append, topology), said


def answer(farm: Farm, model: Checkpoint, topology: Topology) -> list[int]:
    spec = RunSpec(model, topology, dial=farm.dial, joined=Way(farm).joined, timing=FAST, wait=5)
    runtime = open_text(farm.plugins, spec)
    try:
        events = runtime.engine.generate(TextRequest((1, 2, 3), max_tokens=12, ignore_eos=True))
        return [event.token for event in events if isinstance(event, TokenEvent)]
    finally:
        runtime.close()


def plan(model: Checkpoint, workers: list[Surveyed], wishes: Wishes, topology: Topology | None = None) -> Gathered:
    return gather(describe(model), topology or Topology(), DESK, workers, wishes, LoadOptions())


def test_workers_at_addresses_share_a_model_and_answer_as_one_machine(farm: Farm, model: Checkpoint) -> None:
    farm.start("a")
    farm.start("b", memory=2 << 30)
    wishes = Wishes((farm.address("a"), farm.address("b")), spread=True)
    workers, said = look(farm, wishes)
    assert (said, [worker.name for worker in workers]) == ([], ["a", "b"])
    topology = plan(model, workers, wishes).topology
    layers = {node.name: len(node.layers) for node in topology.nodes}
    assert layers == {"a": 2, "b": 5}, "twice the memory, about twice the bytes"
    assert answer(farm, model, topology) == answer(farm, model, Topology())


def test_workers_that_joined_are_used_without_an_address(farm: Farm, model: Checkpoint) -> None:
    farm.start("phone")
    wishes = Wishes((), joining=True, wait=5, spread=True)
    workers, _ = look(farm, wishes, waiting=("phone",))
    topology = plan(model, workers, wishes).topology
    assert topology.nodes[0].host is None
    assert answer(farm, model, topology) == answer(farm, model, Topology())


@pytest.mark.parametrize("spread", [False, True])
def test_a_topology_keeps_what_it_says_and_the_rest_is_filled(farm: Farm, model: Checkpoint, spread: bool) -> None:
    farm.start("a")
    farm.start("b")
    given = Topology((Node("a", farm.address("a"), ("model.layers.5",)), Node("b", farm.address("b"), ())), "t.yml")
    wishes = Wishes(None, spread=spread)
    workers, _ = look(farm, wishes, given)
    assert [worker.name for worker in workers] == ["a", "b"]
    small = replace(DESK, devices=(DeviceProfile("cpu", tight(model, 1.5), 1e10),))
    topology = gather(describe(model), given, small, workers, wishes, LoadOptions()).topology
    assert topology.node("a").layers == ("model.layers.5",)
    assert topology.node("b").layers
    assert answer(farm, model, topology) == answer(farm, model, Topology())


def test_a_small_model_stays_here_and_the_reason_is_given(farm: Farm, model: Checkpoint) -> None:
    farm.start("a")
    workers, _ = look(farm, Wishes((farm.address("a"),)))
    gathered = plan(model, workers, Wishes())
    assert gathered.topology.nodes == ()
    assert "a" in gathered.left_out


def test_a_model_that_fits_nowhere_is_told_with_the_numbers(farm: Farm, model: Checkpoint) -> None:
    farm.start("a", memory=1000)
    workers, _ = look(farm, Wishes((farm.address("a"),)))
    tiny = replace(DESK, devices=(DeviceProfile("cpu", 1000, 1e10),))
    for wishes in (Wishes(spread=True), Wishes()):
        with pytest.raises(CapacityError):
            gather(describe(model), Topology(), tiny, workers, wishes, LoadOptions())


def test_who_cannot_be_used_is_named_with_the_reason(farm: Farm, model: Checkpoint) -> None:
    farm.start("a").profile = None
    farm.start("held")
    farm.node("held", model, ("model.layers.0",)).wait_up(10)
    with LocalCluster(farm.plugins, model, MemoryTransport(), {"own": ["model.layers.0"]}) as cluster:
        own = survey(cluster.dial(cluster.addresses["own"], 5), None, FAST)
    assert not own.bare
    workers, said = look(farm, Wishes((farm.address("a"), farm.address("held"), Address("nowhere", 1, "memory"))))
    assert workers == []
    assert any("nothing is known of a's memory" in line for line in said)
    assert any("held is held by" in line and model.name in line for line in said)
    assert any("nowhere" in line for line in said)
    assert usable([own], said.append) == []
    assert "layers of its own" in said[-1]


def test_two_workers_of_one_name_get_two(farm: Farm) -> None:
    link = LinkProfile(0.001, 1e8)
    same = [Surveyed("pi", None, link, {"bare": True}, DESK) for _ in range(2)]
    assert [worker.name for worker in usable(same, print)] == ["pi", "pi-2"]
    assert [worker.name for worker in usable([replace(same[0], name=MASTER)], print)] == ["master-2"]


def test_what_a_survey_measures_is_plausible(farm: Farm) -> None:
    farm.start("a")
    found = survey(farm.dial(farm.address("a"), 5), farm.address("a"), FAST)
    assert 0 < found.link.round_trip < 1
    assert found.link.rate > 1e6
    assert found.profile == NodeProfile("a", (DeviceProfile("cpu", 1 << 30, 1e10),))
    assert (found.bare, found.model, found.held_by) == (True, "", ())


@pytest.mark.parametrize("nodes", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("memory", [[1, 1, 1], [1, 9, 2], [100, 1, 1]], ids=str)
def test_spreading_covers_every_layer_once_in_runs(model: Checkpoint, nodes: int, memory: list[int]) -> None:
    info = describe(model)
    names = [MASTER, *(f"w{index}" for index in range(nodes - 1))]
    room = {name: memory[index % 3] << 24 for index, name in enumerate(names)}
    whole = Topology(tuple(Node(name, None, ()) for name in names[1:]))
    topology = spread(info, whole, room, 64)
    placed = [layer for node in topology.nodes for layer in node.layers]
    order = [layer.name for layer in info.layers]
    rest = [name for name in order if name not in placed]
    assert rest + placed == order, "the master's run comes first, then the nodes' in their order"
    assert len(topology.nodes) == min(nodes, len(order)) - 1
    assert rest


def test_who_waits_for_nobody_to_join_is_told(farm: Farm) -> None:
    workers, said = look(farm, Wishes((), joining=True, wait=0.01))
    assert workers == []
    assert "nobody joined within 0.01 s" in said[0]


def test_what_workers_takes() -> None:
    from cake_core.cli.gather import addresses

    assert addresses("auto") is None
    assert addresses("none") == ()
    assert addresses("a:1, b") == (Address("a", 1), Address("b"))
    for text in (",", "a:x"):
        with pytest.raises(ConfigError):
            addresses(text)


def test_a_worker_with_layers_of_its_own_is_planned_for_what_the_topology_says(farm: Farm, model: Checkpoint) -> None:
    with LocalCluster(farm.plugins, model, MemoryTransport(), {"own": ["model.layers.0-3"]}) as cluster:
        cluster.workers["own"].profile = lambda _backend: DESK.renamed("own")
        own = survey(cluster.dial(cluster.addresses["own"], 5), cluster.addresses["own"], FAST)
    given = Topology((Node("own", cluster.addresses["own"], tuple(f"model.layers.{i}" for i in range(4))),))
    assert usable([own], pytest.fail, given) == [own]
    loaded = read_memory(own.report["memory"][0])
    found = gathering.cluster_profile(DESK, [own]).node("own").devices[0]
    assert loaded.device == found.device
    taken = loaded.weights  # a CPU commits a cache as it is written
    assert found.memory_free - DESK.devices[0].memory_free == taken > 0


def layers_of(gathered: Gathered) -> dict[str, int]:
    return {node.name: len(node.layers) for node in gathered.topology.nodes}


def tight(model: Checkpoint, share: float) -> int:
    """Memory in which half of the model's layers take `share` for weights and the KV cache of a whole context."""
    info = describe(model)
    whole = sum(layer.nbytes + layer.kv_bytes_per_token * info.context_length for layer in info.layers)
    return int(whole / 2 / share)


@pytest.mark.parametrize("spread", [False, True])
def test_a_planned_kv_cache_is_asked_of_every_node_where_it_is_tight(farm: Farm, model: Checkpoint, spread: bool) -> None:
    room = tight(model, 0.7)
    farm.start("a", memory=room)
    farm.start("b", memory=room)
    wishes = Wishes((farm.address("a"), farm.address("b")), spread=spread)
    workers, _ = look(farm, wishes)
    small = replace(DESK, devices=(DeviceProfile("cpu", room // 8, 1e10),))
    gathered = gather(describe(model), Topology(), small, workers, wishes, LoadOptions())
    assert set(layers_of(gathered)) == {"a", "b"}
    assert gathered.kv_tokens == describe(model).context_length
    options = LoadOptions(kv_tokens=gathered.kv_tokens)
    spec = RunSpec(model, gathered.topology, options, dial=farm.dial, joined=Way(farm).joined, timing=FAST)
    runtime = open_text(farm.plugins, spec)
    try:
        for name in ("a", "b"):
            serving = farm.workers[name].serving
            assert serving is not None
            assert {stage.memory().kv_tokens for stage in serving.stages} == {gathered.kv_tokens}
    finally:
        runtime.close()


def test_where_there_is_room_every_node_may_provide_more_than_was_planned(farm: Farm, model: Checkpoint) -> None:
    farm.start("a")
    wishes = Wishes((farm.address("a"),), spread=True)
    workers, _ = look(farm, wishes)
    assert plan(model, workers, wishes).kv_tokens is None


def test_a_chain_is_planned_where_every_worker_can_be_dialled(model: Checkpoint) -> None:
    far = LinkProfile(0.004, 1e9)
    info, small = describe(model), replace(DESK, devices=(DeviceProfile("cpu", tight(model, 4), 1e10),))
    fast = NodeProfile("w", (DeviceProfile("cpu", tight(model, 1.0), 1e10),))

    def seconds(route: Any, hosts: int) -> float:
        found = [
            Surveyed(n, Address(n, 1) if i < hosts else None, far, {"bare": True}, replace(fast, name=n))
            for i, n in enumerate("abc")
        ]
        ask = PlanRequest(context=info.context_length)
        planned = gathering.plan_for_route(info, gathering.cluster_profile(small, found), ask, route)
        assert len(planned.topology.nodes) == 3
        return planned.prediction.seconds_per_token

    star, chain = seconds("star", 3), seconds("chain", 3)
    assert star - chain == pytest.approx(2 * 0.002, rel=0.01), "two hand-overs, each a hop less"
    assert seconds("auto", 3) == chain
    assert seconds("auto", 2) == star
    assert seconds("chain", 2) == chain


@pytest.mark.parametrize(("asked", "told"), [(None, 64), (32, 32)])
def test_what_the_plan_asks_for_is_loaded_unless_somebody_said_otherwise(
    monkeypatch: pytest.MonkeyPatch, farm: Farm, model: Checkpoint, asked: int | None, told: int
) -> None:
    monkeypatch.setattr("cake_core.cli.gather.gathered_topology", lambda *_: Gathered(Topology(), kv_tokens=64))
    spec = ModelFlags(kv_tokens=asked).run_spec(farm.plugins, model, connector=Way(farm))  # type: ignore[arg-type]
    assert spec.options.kv_tokens == told


def test_how_long_a_worker_may_be_silent_can_be_said(monkeypatch: pytest.MonkeyPatch, farm: Farm, model: Checkpoint) -> None:
    monkeypatch.setattr("cake_core.cli.gather.gathered_topology", lambda *_: Gathered(Topology()))
    for seconds in (10.0, 5.0):
        flags = ModelFlags() if seconds == LinkTiming().dead else ModelFlags(silence_timeout=seconds)
        assert flags.run_spec(farm.plugins, model, connector=Way(farm)).timing == LinkTiming(dead=seconds)  # type: ignore[arg-type]
