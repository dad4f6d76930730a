"""A node that held components of an image model is lost for good: they go elsewhere, and the picture stays the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.core.farm import Farm

from cake_core.checkpoint import Checkpoint
from cake_core.cluster.replan import check_weights, give_away, orphans
from cake_core.errors import CapacityError, CheckpointError, NodeError
from cake_core.events import Failed, Finished, ImageDone, ImageStep
from cake_core.model import LoadOptions
from cake_core.profiles import DeviceProfile, NodeProfile
from cake_core.requests import ImageRequest
from cake_core.runtime import ImageRuntime, RunSpec, open_image
from cake_core.testing.cluster import FAST
from cake_core.testing.contracts.threads import PATIENCE, Task
from cake_core.testing.toys import ToyImageBackend, write_toy_image_checkpoint
from cake_core.topology import MASTER, Node, Topology

pytestmark = pytest.mark.usefixtures("soon_lost")
STEPS = 6
ASKED = ImageRequest("a red apple", width=32, height=32, steps=STEPS, seed=3)
BEFORE, MIDDLE, LAST = 0, 3, STEPS


def desk(memory: int) -> NodeProfile:
    return NodeProfile(MASTER, (DeviceProfile("cpu", memory, 1e10),))


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    return write_toy_image_checkpoint(tmp_path / "model")


@pytest.fixture
def opened(farm: Farm, model: Checkpoint) -> Iterator[Callable[..., ImageRuntime]]:
    """`opened({"a": ["clip"], "b": ["unet", "vae"]}, spares="c", memory=10, rejoin=60.0)`: a master with so much memory."""
    runtimes: list[ImageRuntime] = []

    def make(layers: dict[str, list[str]], spares: str = "", memory: int = 10, rejoin: float = 60.0) -> ImageRuntime:
        nodes = tuple(Node(name, farm.address(name), tuple(given)) for name, given in layers.items())
        spec = RunSpec(
            model, Topology(nodes), dial=farm.dial, timing=FAST, wait=5, rejoin=rejoin, on_loss="replan",
            spares=tuple(Node(name, farm.address(name), ()) for name in spares), profile=lambda _backend: desk(memory),
        )  # fmt: skip
        runtimes.append(open_image(farm.plugins, spec))
        return runtimes[-1]

    yield make
    for runtime in runtimes:
        runtime.close()


@pytest.fixture
def alone(farm: Farm, model: Checkpoint) -> bytes:
    runtime = open_image(farm.plugins, RunSpec(model, Topology()))
    try:
        return picture(started(runtime))
    finally:
        runtime.close()


def started(runtime: ImageRuntime, at: int = -1, then: Callable[[], None] = lambda: None) -> Task[list[Any]]:
    """A job under way; after step `at` (0: before it begins) its own thread does `then`, so that the next step is too late."""
    events: list[Any] = []
    ended = threading.Event()

    def take(batch: Any) -> None:
        events.extend(batch)
        if any(isinstance(event, ImageStep) and event.step == at for event in batch):
            then()
        if isinstance(batch[-1], Finished | Failed):
            ended.set()

    if at == BEFORE:
        then()
    runtime.engine.submit(ASKED, take)
    return Task(lambda: events if ended.wait(PATIENCE) else pytest.fail("the job does not end"))


def picture(job: Task[list[Any]]) -> bytes:
    """The one picture of a job. Raises what it failed with."""
    events = job.result(2 * PATIENCE)
    if isinstance(events[-1], Failed):
        raise events[-1].error
    assert [event.step for event in events if isinstance(event, ImageStep)] == list(range(1, STEPS + 1)), "no step twice"
    (found,) = [event.rgb for event in events if isinstance(event, ImageDone)]
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.02)


@pytest.mark.parametrize("at", [BEFORE, MIDDLE, LAST])
def test_a_worker_takes_them_beside_its_own(farm: Farm, opened: Any, alone: bytes, at: int) -> None:
    farm.start("a")
    farm.start("b")
    runtime = opened({"a": ["clip"], "b": ["unet", "vae"]})
    assert picture(started(runtime, at, lambda: farm.end("b"))) == alone
    assert runtime.placement.nodes == ("a",)
    assert runtime.missing() is None
    assert picture(started(runtime)) == alone, "new requests need no restart"


def test_a_spare_worker_takes_over_and_waiting_requests_go_on(farm: Farm, opened: Any, alone: bytes) -> None:
    for name, memory in (("a", 10), ("b", 10), ("c", 1 << 30)):
        farm.start(name, memory=memory)
    runtime = opened({"a": ["clip", "vae"], "b": ["unet"]}, spares="c")
    jobs = [started(runtime, MIDDLE, lambda: farm.end("b")), started(runtime), started(runtime)]
    assert [picture(job) for job in jobs] == [alone] * 3
    assert runtime.placement.layers_of("c") == ("unet",)
    assert [status.name for status in runtime.nodes()] == ["a", "c"]


def test_the_master_takes_over(farm: Farm, opened: Any, alone: bytes) -> None:
    farm.start("a", memory=10)
    farm.start("b", memory=10)
    runtime = opened({"a": ["unet"], "b": ["clip", "vae"]}, memory=1 << 30)
    assert picture(started(runtime, MIDDLE, lambda: farm.end("a"))) == alone
    assert runtime.placement.layers_of("b") == ("clip", "vae")
    assert picture(started(runtime, MIDDLE, lambda: farm.end("b"))) == alone
    assert runtime.placement.nodes == (MASTER,)
    assert len(runtime.memory()) == 3
    assert picture(started(runtime)) == alone


def test_without_memory_to_spare_it_waits_and_then_says_so(farm: Farm, opened: Any, alone: bytes) -> None:
    farm.start("a", memory=10)
    farm.start("b", memory=10)
    before = set(threading.enumerate())
    runtime = opened({"a": ["unet"], "b": ["clip", "vae"]}, rejoin=1.0)
    with pytest.raises(NodeError, match=r"b.*start the worker there"):
        picture(started(runtime, MIDDLE, lambda: farm.end("b")))
    assert runtime.placement.layers_of("b") == ("clip", "vae"), "it may still come back"
    (guest,) = farm.workers["a"]._guests
    wait_for(lambda: not guest._constants.images)
    farm.start("b", memory=10)
    wait_for(lambda: runtime.missing() is None)
    assert picture(started(runtime)) == alone
    runtime.close()
    wait_for(lambda: not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("cake-")])


def test_it_closes_while_an_image_waits(farm: Farm, opened: Any) -> None:
    farm.start("a", memory=10)
    runtime = opened({"a": ["unet"]}, rejoin=3600.0)
    lost = threading.Event()
    job = started(runtime, MIDDLE, lambda: (farm.end("a"), lost.set())[0])
    assert lost.wait(PATIENCE)
    Task(runtime.close).result()
    assert isinstance(job.result()[-1], Finished | Failed)


def test_of_lost_replicas_one_is_placed_again(farm: Farm, opened: Any, alone: bytes) -> None:
    for name, memory in (("a", 10), ("b", 10), ("c", 1 << 30)):
        farm.start(name, memory=memory)
    runtime = opened({"a": ["unet"], "b": ["unet"]}, spares="c")

    def lose() -> None:
        farm.end("a")
        farm.end("b")

    lose()
    wait_for(lambda: runtime.placement.layers_of("c") == ("unet",))
    assert picture(started(runtime)) == alone


def test_a_taker_that_cannot_load_is_passed_over(
    farm: Farm, opened: Any, alone: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, memory in (("a", 10), ("c", 2 << 30), ("d", 1 << 30)):
        farm.start(name, memory=memory)
    runtime = opened({"a": ["unet"]}, spares="cd")
    load, refused = ToyImageBackend.load, list[str]()

    def refuse_once(self: ToyImageBackend, *arguments: Any) -> Any:
        if not refused:
            refused.append(arguments[2])
            raise CapacityError("somebody else has taken the memory; wait")
        return load(self, *arguments)

    monkeypatch.setattr(ToyImageBackend, "load", refuse_once)
    assert picture(started(runtime, MIDDLE, lambda: farm.end("a"))) == alone
    assert refused == ["unet"]
    assert runtime.placement.layers_of("d") == ("unet",)


def test_components_are_given_away_whole(model: Checkpoint) -> None:
    info = ToyImageBackend().describe(model, LoadOptions())
    unet, vae = (info.layer(name).nbytes for name in ("unet", "vae"))
    given = Topology((Node("a", None, ("clip",)), Node("b", None, ("unet", "vae"))), "t.yml")
    new = give_away(info, given, ["b"], {"a": vae, MASTER: vae - 1, "c": unet}, 0)
    assert new == Topology((Node("a", None, ("clip", "vae")), Node("c", None, ("unet",))), "t.yml")
    with pytest.raises(CapacityError, match="the layers of b take"):
        give_away(info, given, ["b"], {"a": vae, MASTER: unet - 1, "c": unet - 1}, 0)


def test_what_a_replica_still_serves_is_not_placed_again(model: Checkpoint) -> None:
    info = ToyImageBackend().describe(model, LoadOptions())
    given = Topology((Node("a", None, ("unet",)), Node("b", None, ("unet", "vae"))), "t.yml")
    assert orphans(given, ["a"]) == set()
    assert orphans(given, ["b"]) == {"vae"}
    assert orphans(given, ["a", "b"]) == {"unet", "vae"}
    assert give_away(info, given, ["b"], {"c": 1 << 20}, 0).node("c").layers == ("vae",)


def test_what_this_node_has_no_weights_of_is_waited_for(model: Checkpoint) -> None:
    info = ToyImageBackend().describe(model, LoadOptions())
    check_weights(info, model, {"clip", "unet"}, ["b"])
    for tensors in ((), ("left.out",)):
        part = replace(info, layers=tuple(replace(layer, tensors=tensors) for layer in info.layers if layer.name == "unet"))
        with pytest.raises(CheckpointError, match=r"no weights of unet on this node.*waiting for b"):
            check_weights(part, model, {"unet"}, ["b"])
