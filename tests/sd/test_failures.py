"""Nodes that go, components that do not fit, numbers that are none: typed errors, and the same picture when it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cake_core.errors import (
    Cancelled,
    CapacityError,
    CheckpointError,
    ConfigError,
    NodeLost,
    NodeMismatch,
    StageError,
    UnsupportedModel,
)  # fmt: skip
from cake_core.events import ImageStep
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.model import LoadOptions, Tensor
from cake_core.requests import ImageRequest
from cake_sd import loading
from cake_sd.backend import SdBackend

REQUEST = ImageRequest("a red apple", "grey", 64, 64, steps=4, guidance=5.0, seed=3)
CPU = LoadOptions(device="cpu")


def _lose(component: Any, at: int, times: int = 1, method: str = "forward") -> None:
    """Has the `at`-th call of a method, and the next `times - 1`, fail as a lost node's do."""
    count = 0

    def before(called: str) -> None:
        nonlocal count
        count += called == method
        if called == method and at <= count < at + times:
            raise NodeLost("w0 is lost", "w0", "tcp://w0:1")

    component.before = before


@pytest.mark.parametrize("family", ["sd15", "flux", "pixart"])
@pytest.mark.parametrize("loop", ["master", "worker"])
def test_cancelling_stops_within_a_step_and_leaves_the_model_usable(model: Any, cluster: Any, family: str, loop: str) -> None:
    made = cluster(model(family), ("unet", "transformer"), loop=loop)
    request = ImageRequest("a red apple", width=64, height=64, steps=6, seed=3)
    expected = made.paint(request)
    events: list[Any] = []

    def steps() -> int:
        return sum(isinstance(event, ImageStep) for event in events)

    with pytest.raises(Cancelled):
        made.painter.generate(request, events.append, lambda: steps() >= 3)
    assert steps() <= 4
    assert made.paint(request) == expected


def test_a_step_is_repeated_when_its_node_comes_back(model: Any, cluster: Any) -> None:
    made = cluster(model("sd15"), ("unet",))
    expected = made.paint(REQUEST)
    _lose(made.components["unet"][0], at=3, times=2)
    assert made.paint(REQUEST) == expected


def test_a_replica_takes_over(model: Any, cluster: Any) -> None:
    made = cluster(model("sd15"), ("unet",), replicas={"unet": 2})
    expected = made.paint(REQUEST)
    first, second = made.wires["unet"]
    before = second.methods.count("forward")
    _lose(made.components["unet"][0], at=3, times=1000)
    assert made.paint(REQUEST) == expected
    assert second.methods.count("forward") - before == 3
    assert made.paint(REQUEST) == expected, "and the next request does not wait for the lost one"
    assert first.methods.count("forward") == 5 + 2


@pytest.mark.parametrize("loop", ["master", "worker"])
def test_a_node_that_stays_away_is_an_error_that_names_it(model: Any, cluster: Any, loop: str) -> None:
    made = cluster(model("sd15"), ("unet",), rejoin=0.25, loop=loop)
    _lose(made.components["unet"][0], at=2, times=1000, method="forward" if loop == "master" else "loop_next")
    with pytest.raises(NodeLost, match="w0 is lost"):
        made.paint(REQUEST)


def test_an_error_of_the_node_that_decodes_ends_the_request(model: Any, cluster: Any) -> None:
    """Also one of the last picture's, and of one whose successor is being denoised; the model stays usable."""
    made = cluster(model("sd15"), ("vae",), rejoin=0.1)
    request = replace(REQUEST, images=3)
    expected = made.paint(request)
    for at in (1, 2, 3):
        _lose(made.components["vae"][0], at, times=1000, method="decode")
        with pytest.raises(NodeLost, match="w0 is lost"):
            made.paint(request)
    made.components["vae"][0].before = lambda _method: None
    assert made.paint(request) == expected


def test_waiting_for_a_node_can_be_cancelled(model: Any, cluster: Any) -> None:
    made = cluster(model("sd15"), ("unet",), rejoin=60)
    _lose(made.components["unet"][0], at=1, times=1000)
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 5

    with pytest.raises(Cancelled):
        made.painter.generate(REQUEST, lambda _event: None, cancelled)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_loop_starts_anew_when_its_node_was_lost(model: Any, cluster: Any, replicas: int) -> None:
    made = cluster(model("sd15"), ("unet",), loop="worker", replicas={"unet": replicas})
    expected = made.paint(REQUEST)
    _lose(made.components["unet"][0], at=3, method="loop_next")
    assert made.paint(REQUEST) == expected


def test_a_loop_starts_anew_on_a_worker_that_was_restarted(model: Any, cluster: Any) -> None:
    made = cluster(model("sd15"), ("unet",), loop="worker")
    expected = made.paint(REQUEST)
    component = made.components["unet"][0]
    forgot = False

    def forget(method: str) -> None:
        nonlocal forgot
        if method == "loop_next" and not forgot and made.wires["unet"][0].methods.count("loop_next") > 7:
            forgot = True
            for request in list(component._component._loops):
                component._component.close(request)

    component.before = forget
    assert made.paint(REQUEST) == expected
    assert forgot


def test_a_component_of_another_model_is_refused(model: Any, tmp_path: Path) -> None:
    backend = SdBackend()
    ours, theirs = DiffusersCheckpoint(model("sd15")), DiffusersCheckpoint(model("sd21"))
    info = backend.describe(ours, CPU)
    components = {layer.name: [backend.load(ours, info, layer.name, CPU)] for layer in info.layers}
    components["unet"] = [backend.load(theirs, backend.describe(theirs, CPU), "unet", CPU)]
    with pytest.raises(NodeMismatch, match=r"another model than sd15.*same --model"):
        backend.assemble(ours, info, components, CPU)
    del components["unet"]
    with pytest.raises(ConfigError, match="nothing serves unet"):
        backend.assemble(ours, info, components, CPU)


class _Nan:
    """A component whose answers are no numbers."""

    def __init__(self, inner: Any, key: str) -> None:
        self.inner, self.key, self.name = inner, key, inner.name

    def call(self, *arguments: Any) -> dict[str, Tensor]:
        results = dict(self.inner.call(*arguments))
        if self.key in results:
            old = results[self.key]
            results[self.key] = Tensor(old.dtype, old.shape, b"\xff" * old.nbytes)
        return results

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_latents_that_are_no_numbers_name_the_dtype(model: Any) -> None:
    backend, checkpoint = SdBackend(), DiffusersCheckpoint(model("sd15"))
    info = backend.describe(checkpoint, CPU)
    components: dict[str, Any] = {layer.name: [backend.load(checkpoint, info, layer.name, CPU)] for layer in info.layers}
    components["unet"] = [_Nan(components["unet"][0], "output")]
    painter = backend.assemble(checkpoint, info, components, CPU)
    with pytest.raises(StageError, match=r"latents are no numbers.*float32.*unet with --dtype"):
        painter.generate(REQUEST, lambda _event: None, lambda: False)
    vae = backend.load(checkpoint, info, "vae", LoadOptions(dtype="bf16", device="cpu"))
    with pytest.raises(StageError, match=r"vae decoded.*bf16 is the likely reason"):
        vae.run("decode", 1, {"z": torch.full((1, 4, 8, 8), float("nan"))})


def test_an_autoencoder_that_overflows_in_f16_is_loaded_in_f32(model: Any) -> None:
    backend, checkpoint, half = SdBackend(), DiffusersCheckpoint(model("sdxl")), LoadOptions(dtype="f16", device="cpu")
    info = backend.describe(checkpoint, half)
    assert backend.load(checkpoint, info, "vae", half).memory().dtype == "f32"
    assert backend.load(checkpoint, info, "clip", half).memory().dtype == "f16"


def test_too_little_memory_is_told_before_loading(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, checkpoint = SdBackend(), DiffusersCheckpoint(model("sd15"))
    monkeypatch.setattr(loading, "free_memory", lambda _device: 1000)
    monkeypatch.setattr(loading, "_load_module", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(CapacityError, match=r"unet needs 0\.00 GB and cpu has 0\.00 GB free"):
        backend.load(checkpoint, backend.describe(checkpoint, CPU), "unet", CPU)


def _copy(model: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(model("sd15"), tmp_path / "copy"))


def test_a_layer_whose_weights_are_elsewhere_cannot_be_loaded_here(model: Any, tmp_path: Path) -> None:
    folder = _copy(model, tmp_path)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    backend, checkpoint = SdBackend(), DiffusersCheckpoint(folder)
    info = backend.describe(checkpoint, CPU)
    assert {layer.name: bool(layer.nbytes) for layer in info.layers} == {"clip": True, "unet": False, "vae": True}
    assert backend.load(checkpoint, info, "clip", CPU).memory().weights == info.layer("clip").nbytes
    with pytest.raises(CheckpointError, match=r"has no weights of unet on this machine.*--sd-unet"):
        backend.load(checkpoint, info, "unet", CPU)


def test_damaged_folders_say_what_is_wrong(model: Any, tmp_path: Path) -> None:
    folder = _copy(model, tmp_path)
    backend = SdBackend()
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        backend.describe(DiffusersCheckpoint(folder), CPU)
    shutil.copy(model("sd15") / "unet/diffusion_pytorch_model.safetensors", weights)
    info = backend.describe(DiffusersCheckpoint(folder), CPU)
    (folder / "unet/config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        backend.load(DiffusersCheckpoint(folder), info, "unet", CPU)
    shutil.copy(model("sd15") / "unet/config.json", folder / "unet/config.json")
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["os", "system"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModel, match=r"os\.system"):
        backend.load(DiffusersCheckpoint(folder), info, "unet", CPU)
    del index["unet"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModel, match="no unet or transformer"):
        backend.describe(DiffusersCheckpoint(folder), CPU)


def test_components_refuse_unknown_methods_and_devices(model: Any) -> None:
    backend, checkpoint = SdBackend(), DiffusersCheckpoint(model("sd15"))
    info = backend.describe(checkpoint, CPU)
    clip = backend.load(checkpoint, info, "clip", CPU)
    with pytest.raises(StageError, match="no method 'decode'"):
        clip.call("decode", 1, {}, {}, {})
    with pytest.raises(ConfigError, match=r"device 'cuda:77' cannot be used"):
        backend.load(checkpoint, info, "clip", LoadOptions(device="cuda:77"))
    with pytest.raises(ConfigError, match="not quantised"):
        backend.load(checkpoint, info, "clip", LoadOptions(device="cpu", quantize="int4"))
