"""Workers that brought no model: assigned over the wire, with weights from the master or from one another."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.core.farm import Farm, describe

from cake_core.assignment import Assignment
from cake_core.bundle import layer_files
from cake_core.checkpoint import Checkpoint, SafetensorsCheckpoint
from cake_core.cluster.assigner import NodeAssigner
from cake_core.cluster.node import RemoteNode
from cake_core.errors import (
    ChannelClosed,
    CheckpointError,
    ConfigError,
    NodeBusy,
    NodeMismatch,
    ProtocolError,
    StageError,
    UnsupportedModel,
)
from cake_core.model import LoadOptions
from cake_core.resolve import open_path
from cake_core.testing.cluster import LocalCluster
from cake_core.testing.memory import MemoryTransport
from cake_core.testing.toys import ToyTextBackend, write_toy_checkpoint
from cake_core.weights.manifest import FileSpec
from cake_core.weights.supply import ImageSupply
from cake_core.weights.transfer import Transfer
from cake_core.weights.views import Views
from cake_core.wire.protocol import Type

FRONT = ("model.layers.0", "model.layers.1")
BACK = ("model.layers.2", "model.layers.3")


def received(node: RemoteNode) -> int:
    assigner = node._assigner
    assert isinstance(assigner, NodeAssigner)
    return assigner.received


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    return write_toy_checkpoint(tmp_path / "model")


def wait_for(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


def test_a_bare_worker_loads_what_it_is_assigned(farm: Farm, model: Checkpoint) -> None:
    worker = farm.start("w")
    node = farm.node("w", model, FRONT)
    node.wait_up(10)
    assert worker.serving is not None
    assert worker.serving.spans == (FRONT,)
    assert received(node) > 0
    assert node.status().state == "up"


def test_a_backend_is_warmed_while_weights_are_fetched_and_then_loads(
    farm: Farm, model: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transfer does not get on before `warm` has begun, and nothing is loaded before it is over."""
    begun, load, transfer, events = threading.Event(), ToyTextBackend.load, Transfer.run, list[str]()

    def warm(self: ToyTextBackend) -> None:
        begun.set()
        assert fetched.wait(10)
        events.append("warm")
        raise ImportError("there is no such library")

    def run(self: Transfer) -> None:
        assert begun.wait(10), "not warmed while fetching"
        transfer(self)
        events.append("fetched")
        fetched.set()

    def loads(self: ToyTextBackend, *args: Any, **more: Any) -> Any:
        events.append("load")
        return load(self, *args, **more)

    fetched = threading.Event()
    monkeypatch.setattr(ToyTextBackend, "warm", warm, raising=False)
    monkeypatch.setattr(ToyTextBackend, "load", loads)
    monkeypatch.setattr(Transfer, "run", run)
    farm.start("w")
    node = farm.node("w", model, FRONT)
    node.wait_up(10)
    assert events == ["fetched", "warm", "load"]
    assert node.status().state == "up", "what warming failed with is for loading to say"


@pytest.mark.skipif(os.name == "nt", reason="there every model is loaded whole")
@pytest.mark.parametrize("streams", [True, False])
def test_only_a_backend_that_waits_for_bytes_is_given_a_model_that_is_not_all_here(
    farm: Farm, model: Checkpoint, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    load, early = ToyTextBackend.load, list[bool]()

    def loads(self: ToyTextBackend, checkpoint: Checkpoint, *args: Any, **more: Any) -> Any:
        early.append(checkpoint.wait is not None)
        return load(self, checkpoint, *args, **more)

    monkeypatch.setattr(ToyTextBackend, "load", loads)
    if not streams:
        monkeypatch.delattr(ToyTextBackend, "streams")
    farm.start("w")
    farm.node("w", model, FRONT).wait_up(10)
    assert early == [streams]


def test_what_lies_in_the_cache_is_a_checkpoint(farm: Farm, model: Checkpoint) -> None:
    worker = farm.start("w")
    layers = (BACK[1], "model.norm", "lm_head")
    farm.node("w", model, layers).wait_up(10)
    (view,) = Views(worker.tenant().means.store).list()
    assert (view.model, view.nbytes) == (model.name, view.total)
    opened = open_path(view.path)
    held = [name for layer in layers for name in describe(model).layer(layer).tensors]
    assert sorted(opened.tensors) == sorted(held)
    assert opened.fingerprint(held) == model.fingerprint(held)
    assert describe(opened).layers == describe(model).layers


def test_a_second_start_fetches_nothing(farm: Farm, model: Checkpoint) -> None:
    farm.start("w")
    farm.node("w", model, FRONT).wait_up(10)
    farm.start("again", home="w")
    node = farm.node("again", model, FRONT)
    node.wait_up(10)
    assert received(node) == 0


def test_other_layers_of_the_same_model_fetch_only_what_is_new(farm: Farm, model: Checkpoint) -> None:
    worker = farm.start("w")
    first = farm.node("w", model, FRONT)
    first.wait_up(10)
    first.close()
    wait_for(lambda: worker.holders() == [])
    second = farm.node("w", model, (*FRONT, BACK[0]))
    second.wait_up(10)
    assert worker.serving is not None
    assert worker.serving.spans == ((*FRONT, BACK[0]),)
    images = layer_files(model, describe(model), (BACK[0],))
    weights = sum(image.nbytes for path, image in images.items() if path.endswith(".safetensors"))
    # Beside the weights of the new layer the index, which lists them.
    assert weights <= received(second) < weights + 2000


def test_two_masters_share_what_is_the_same_and_are_told_who_holds_what_is_not(farm: Farm, model: Checkpoint) -> None:
    farm.start("w")
    one, two = farm.node("w", model, FRONT), farm.node("w", model, FRONT, who="couch")
    one.wait_up(10)
    two.wait_up(10)
    third = farm.node("w", model, BACK, who="bed")
    with pytest.raises(NodeBusy, match=r"w is held by master at .* \(desk|couch\) with model: model\.layers\.0-1; wait"):
        third.wait_up(1)
    one.close()
    two.close()
    third.wait_up(10)  # it tries again by itself


def test_a_node_has_the_weights_from_another_node(farm: Farm, model: Checkpoint) -> None:
    farm.start("w")
    farm.node("w", model, FRONT).wait_up(10)
    farm.start("v")
    node = farm.node("v", model, FRONT, sources=(farm.address("w"),))
    assigner = node._assigner
    assert isinstance(assigner, NodeAssigner)
    assigner._supply = NoWeights(assigner._supply)
    node.wait_up(10)
    assert received(node) > 0


class NoWeights:
    """A master that has no weights itself: only configuration."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.packer = real.packer

    def holds(self, names: list[str]) -> list[str]:
        return []

    def piece(self, name: str, piece: int) -> tuple[bytes, bytes]:
        raise CheckpointError("I have none")


def test_a_model_that_nobody_serves_there_is_told_with_the_node(farm: Farm, tmp_path: Path) -> None:
    real = write_toy_checkpoint(tmp_path / "real")
    write_toy_checkpoint(tmp_path / "odd", model_type="unheard-of", architectures=["OddForCausalLM"])
    odd = SafetensorsCheckpoint(tmp_path / "odd")
    farm.start("w")
    supply = ImageSupply()
    files = supply.offer(layer_files(odd, describe(real), FRONT))
    assigner = NodeAssigner("w", lambda: Assignment("desk", "odd", "text", (FRONT,), LoadOptions(), files), supply)
    link = farm.link("w", handler=lambda link, message, body: assigner.handle(link, message))
    with pytest.raises(UnsupportedModel, match=r"w: .*no installed backend serves architecture 'OddForCausalLM'"):
        assigner.assign(link)


@pytest.mark.parametrize(
    "change",
    [
        {"files": [["../x", "0" * 64, 1, 1]]},
        {"files": [["/etc/passwd", "0" * 64, 1, 1]]},
        {"files": [["C:\\x", "0" * 64, 1, 1]]},
        {"files": [["a/b/c", "0" * 64, 1, 1]]},
        {"files": [["x\0y", "0" * 64, 1, 1]]},
        {"files": [["con", "0" * 64, 1, 1]]},
        {"files": [[".hidden", "0" * 64, 1, 1]]},
        {"files": [["x" * 200, "0" * 64, 1, 1]]},
        {"files": [["x ", "0" * 64, 1, 1]]},
        {"files": [["x", "../../../x", 1, 1]]},
        {"files": [["x", "0" * 64, -1, 0]]},
        {"files": [["x", "0" * 64, True, 1]]},
        {"files": [["x", "0" * 64, 1, 1], ["X", "1" * 64, 1, 1]]},
        {"files": [["x", "0" * 64, 1]]},
        {"files": [["x", "0" * 64, 1, 2]]},
        {"files": [["x", "0" * 64, 1, -1]]},
        {"files": [["x", "0" * 64, 1, True]]},
        {"stages": []},
        {"stages": [[]]},
        {"stages": [[7]]},
        {"sources": ["://"]},
        {"options": {"dtype": "f7"}},
        {"options": {"context": "long"}},
        *({"options": {"extra": {"sd_clip": path}}} for path in ("/etc/passwd", "x.bin", "a/b", "..", "", "C:x", "clip")),
        {"options": {"extra": {"sd_lora": ["x"]}}},
        {"options": {"extra": {"sd_scheduler": "../x"}}},
    ],
)
def test_hostile_assignments_are_refused(change: dict[str, Any]) -> None:
    good = Assignment("m", "model", "text", (FRONT,), LoadOptions(), (FileSpec("config.json", "0" * 64, 3, 3),)).as_fields()
    assert Assignment.from_fields(good).as_fields() == good
    with pytest.raises(ProtocolError):
        Assignment.from_fields({**good, **change})


def test_a_hostile_master_writes_nothing_outside_the_cache(farm: Farm, model: Checkpoint, tmp_path: Path) -> None:
    worker = farm.start("w")
    before = sorted(tmp_path.rglob("*"))
    for path in ("../../escaped", "/etc/escaped", "models/../../../escaped"):
        fields = Assignment("m", "model", "text", (FRONT,), LoadOptions(), ()).as_fields()
        with pytest.raises(ChannelClosed, match="no path inside"):
            farm.link("w").ask(Type.ASSIGN, {**fields, "files": [[path, "0" * 64, 5, 5]]}).result(5)
    assert sorted(tmp_path.rglob("*")) == before
    assert worker.serving is None


def test_options_that_name_files_of_the_master_are_not_assigned() -> None:
    options = LoadOptions(extra={"sd_lora": ("style.safetensors",)})
    with pytest.raises(ConfigError, match="--sd-lora cannot be assigned"):
        Assignment("m", "model", "image", (("unet",),), options, ()).as_fields()


def test_options_that_are_numbers_or_words_are_assigned() -> None:
    extra = {
        "sd_scheduler": "euler-ancestral",
        "sd_version": "v1-5",
        "sd_loop": "worker",
        "sd_clip_skip": 2,
        "sd_compile": True,
    }
    sent = Assignment(
        "m", "model", "image", (("unet",),), LoadOptions(extra=extra), (FileSpec("a", "0" * 64, 1, 1),)
    ).as_fields()
    assert Assignment.from_fields(sent).options.extra == extra
    for path in ("C:x", "unet.bin", "a/b", "unet"):
        with pytest.raises(ConfigError, match="--sd-unet cannot be assigned"):
            Assignment("m", "model", "image", (("unet",),), LoadOptions(extra={"sd_unet": path}), ()).as_fields()


def test_a_worker_with_layers_of_its_own_is_not_assigned_others(farm: Farm, model: Checkpoint) -> None:
    with LocalCluster(farm.plugins, model, MemoryTransport(), {"w0": list(FRONT)}) as cluster:
        link = farm.link("w0", cluster)
        fields = Assignment("m", "model", "text", (FRONT,), LoadOptions(), ()).as_fields()
        with pytest.raises(NodeMismatch, match="layers of its own"):
            link.ask(Type.ASSIGN, fields).result(5)
        link.close()


def test_nothing_is_served_before_something_is_assigned(farm: Farm) -> None:
    farm.start("w")
    with pytest.raises(NodeMismatch, match="no layers yet"):
        farm.link("w").ask(Type.ATTACH, {"model_type": "text", "stages": [list(FRONT)]}).result(5)
    with pytest.raises(StageError, match="ticket"):
        farm.workers["w"].tenant().lend(7, farm.link("w"))
    report, _ = farm.link("w").ask(Type.STATUS).result(5)
    assert report.fields["report"]["model"] == ""
