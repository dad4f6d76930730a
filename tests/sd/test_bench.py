"""Measuring: models of real size made up on the spot, `cake bench image`, traces, and the GPU beside the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from cake_core.cli.main import make_cli
from cake_core.events import ImageDone, ImageWarning
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.model import LoadOptions
from cake_core.plugins import Plugins
from cake_core.requests import ImageRequest
from cake_sd import hooks
from cake_sd.backend import SdBackend
from cake_sd.hub import resolve

EMOJI = Path(__file__).parents[2] / "plugins/cake_emoji/src/cake_emoji/model"

MILLIONS = {
    "v1-5": {"clip": 123.1, "unet": 859.5, "vae": 83.7},
    "v2-1": {"clip": 340.4, "unet": 865.9, "vae": 83.7},
    "xl": {"clip": 123.1, "clip2": 694.7, "unet": 2567.5, "vae": 83.7},
}
"""Published parameter counts."""


@pytest.mark.parametrize("name", MILLIONS)
def test_random_models_have_the_published_sizes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAKE_CACHE_DIR", str(tmp_path))
    checkpoint = resolve(f"random:{name}")
    assert checkpoint is not None
    info = SdBackend().describe(checkpoint, LoadOptions(dtype="f16"))
    assert {layer.name: round(layer.nbytes / 2e6, 1) for layer in info.layers} == MILLIONS[name]
    assert resolve("random:llama-3-8b") is None


def test_a_random_component_is_made_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAKE_CACHE_DIR", str(tmp_path))
    backend, checkpoint, options = SdBackend(), resolve("random:v1-5"), LoadOptions(dtype="bf16", device="cpu")
    assert checkpoint is not None
    info = backend.describe(checkpoint, options)
    vae = backend.load(checkpoint, info, "vae", options)
    assert vae.memory().weights == info.layer("vae").nbytes
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_command_measures_what_was_asked(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAKE_CONFIG_DIR", str(tmp_path))
    plugins = Plugins(entries=())
    plugins.register("sd", hooks)
    asked = ["bench", "image", "--steps", "3", "--width", "64", "--height", "48", "--n", "2", "--runs", "2"]
    asked += ["--device", "cpu", "--dtype", "f32", "--json", "--model"]
    result = CliRunner().invoke(make_cli(plugins), [*asked, str(model("sd15"))])
    assert result.exit_code == 0, result.output
    measured = json.loads(result.stdout)
    expected = {"model": "sd15", "device": "cpu", "dtype": "f32", "width": 64, "height": 48, "images": 2, "calls": 0}
    assert {key: measured[key] for key in expected} == expected
    assert measured["steps"] == 4, "PNDM makes one more"
    assert 0 < measured["step_seconds"] < measured["image_seconds"]


def test_traffic_counts_what_crossed(model: Any, cluster: Any) -> None:
    made = cluster(model("sd15"), ("unet", "vae"))
    made.paint(ImageRequest("a red apple", width=64, height=64, steps=4, seed=1))
    traffic = made.painter.traffic
    wires = [wire for found in made.wires.values() for wire in found]
    for name in ("calls", "sent", "constants", "received"):
        assert getattr(traffic, name) == sum(getattr(wire, name) for wire in wires)
    assert traffic.seconds > 0


def test_a_trace_is_written_when_asked_for(model: Any, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    events = cluster(model("sd15")).events(ImageRequest("apple", width=64, height=64, steps=2, extra={"trace": True}))
    (file,) = tmp_path.glob("trace-*.json")
    assert [event.message for event in events if isinstance(event, ImageWarning)] == [f"wrote {file}"]
    spans = json.loads(file.read_text())["traceEvents"]
    names = [span["name"] for span in spans]
    assert (names.count("clip encode"), names.count("unet forward"), names.count("vae decode")) == (2, 3, 1)
    assert all(span["ph"] == "X" and span["dur"] > 0 for span in spans)


def _apple(device: str, dtype: str, **extra: Any) -> bytes:
    backend, checkpoint = SdBackend(), DiffusersCheckpoint(EMOJI)
    options = LoadOptions(dtype=dtype, device=device, extra=extra)
    info = backend.describe(checkpoint, options)
    components = {layer.name: [backend.load(checkpoint, info, layer.name, options)] for layer in info.layers}
    events: list[Any] = []
    backend.assemble(checkpoint, info, components, options).generate(
        ImageRequest("a red apple", seed=3), events.append, lambda: False
    )
    (done,) = [event for event in events if isinstance(event, ImageDone)]
    return bytes(done.rgb)


def _distance(one: bytes, other: bytes) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def test_the_apple_is_the_same_apple_in_bf16() -> None:
    assert 0 < _distance(_apple("cpu", "f32"), _apple("cpu", "bf16")) < 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; its twin runs on the CPU")
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_the_apple_is_the_same_apple_on_a_gpu(dtype: str) -> None:
    assert _distance(_apple("cpu", "f32"), _apple("cuda", dtype)) < 8
