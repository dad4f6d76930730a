"""Over TCP: every family over two workers, and one model over real processes in every split, also when one is killed."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.sd.processes import Worker, master, plugins_over_tcp

from cake_core.errors import NodeError
from cake_core.events import ImageDone, ImageStep
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.model import LoadOptions
from cake_core.requests import ImageRequest
from cake_core.runtime import ImageRuntime
from cake_core.testing.cluster import LocalCluster

FAMILIES = ("sd15", "sd21", "sdxl", "turbo", "sd3", "flux", "pixart")
REQUEST = ImageRequest("a red apple", width=64, height=48, steps=3, seed=7)


def paint(runtime: ImageRuntime, request: ImageRequest = REQUEST) -> list[bytes]:
    return [event.rgb for event in runtime.engine.generate(request) if isinstance(event, ImageDone)]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_seeds_own_split_over_tcp(kit: Any, model: Any, family: str, dtype: str) -> None:
    """The denoiser on one worker, everything else on the other: bit for bit diffusers."""
    folder, plugins = model(family), plugins_over_tcp()
    checkpoint, options = DiffusersCheckpoint(folder), LoadOptions(dtype=dtype, device="cpu")
    names = [layer.name for layer in plugins.backends["sd"].describe(checkpoint, options).layers]
    layers = {
        "w0": [n for n in names if n in ("unet", "transformer")],
        "w1": [n for n in names if n not in ("unet", "transformer")],
    }
    binning = {"use_resolution_binning": False} if family == "pixart" else {}
    expected = kit.pictures(
        kit.plain(folder, dtype), 7, prompt="a red apple", width=64, height=48, num_inference_steps=3, **binning
    )
    with LocalCluster(plugins, checkpoint, plugins.transports["tcp"], layers, options) as cluster:
        assert paint(cluster.open_image()) == expected


def test_a_loop_beside_the_denoiser_over_tcp(model: Any) -> None:
    plugins, checkpoint = plugins_over_tcp(), DiffusersCheckpoint(model("sdxl"))
    options = LoadOptions(dtype="f32", device="cpu")
    with LocalCluster(plugins, checkpoint, plugins.transports["tcp"], {"w0": ["unet"]}, options) as cluster:
        expected = paint(cluster.open_image())
    with LocalCluster(plugins, checkpoint, plugins.transports["tcp"], {"w0": ["unet"]}, options) as cluster:
        looping = LoadOptions(dtype="f32", device="cpu", extra={"sd_loop": "worker"})
        runtime = cluster.open_image(options=looping)
        steps = [event for event in runtime.engine.generate(REQUEST) if isinstance(event, ImageStep)]
        assert [step.step for step in steps] == list(range(1, steps[0].steps + 1))
        assert paint(runtime) == expected


def test_a_request_waits_for_a_lost_node_as_long_as_it_was_told(model: Any) -> None:
    plugins, checkpoint = plugins_over_tcp(), DiffusersCheckpoint(model("sd15"))
    options = LoadOptions(dtype="f32", device="cpu")
    with LocalCluster(plugins, checkpoint, plugins.transports["tcp"], {"w0": ["unet"]}, options) as cluster:
        runtime = cluster.open_image(rejoin=0.5)
        events = runtime.engine.generate(replace(REQUEST, steps=50))
        next(event for event in events if isinstance(event, ImageStep) and event.step == 2)
        cluster.stop("w0")
        started = time.monotonic()
        with pytest.raises(NodeError, match="w0"):
            list(events)
        assert 0.4 <= time.monotonic() - started < 20.0, "half a second, not the half minute that it is otherwise"


@pytest.fixture(scope="module")
def workers(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Worker]]:
    """Four processes: each component once, the unet twice."""
    home = tmp_path_factory.mktemp("workers")
    layers = {"w0": "unet", "w1": "clip", "w2": "vae", "w3": "unet"}
    started = {name: Worker(home, name, model("sd15"), layer) for name, layer in layers.items()}
    yield started
    for worker in started.values():
        worker.end()


def _entries(chosen: list[Worker]) -> dict[str, Any]:
    return {worker.name: {"host": f"127.0.0.1:{worker.port}", "layers": [worker.layer]} for worker in chosen}


@pytest.mark.timeout(240)
def test_every_split_over_real_processes(kit: Any, model: Any, workers: dict[str, Worker]) -> None:
    folder = model("sd15")
    expected = kit.pictures(kit.plain(folder), 7, prompt="a red apple", width=64, height=48, num_inference_steps=3)
    for count in (1, 2, 3, 4):
        for names in itertools.combinations(workers, count):
            with master(folder, _entries([workers[name] for name in names])) as runtime:
                assert paint(runtime) == expected, f"split over {names}"


@pytest.mark.timeout(240)
def test_a_worker_killed_in_mid_image_is_replaced_by_its_replica(kit: Any, model: Any, workers: dict[str, Worker]) -> None:
    folder = model("sd15")
    request = ImageRequest("a red apple", width=64, height=48, steps=12, seed=7)
    expected = kit.pictures(kit.plain(folder), 7, prompt="a red apple", width=64, height=48, num_inference_steps=12)
    painted: list[bytes] = []
    with master(folder, _entries(list(workers.values()))) as runtime:
        for event in runtime.engine.generate(request):
            if isinstance(event, ImageStep) and event.step == 4:
                workers["w0"].end(signal.SIGKILL)
            elif isinstance(event, ImageDone):
                painted.append(event.rgb)
        assert painted == expected
        assert {node.name: node.state for node in runtime.nodes()}["w3"] == "up"


@pytest.mark.timeout(240)
def test_bundles_are_enough_for_worker_processes_and_theirmaster(kit: Any, model: Any, tmp_path: Path) -> None:
    """The model is split and gone: each worker has its component's folder, the master not a single weight."""
    folder = Path(shutil.copytree(model("sd15"), tmp_path / "model"))
    layers = {"w0": ["unet"], "w1": ["clip", "vae"]}
    topology, out = tmp_path / "topology.yml", tmp_path / "out"
    topology.write_text(yaml.safe_dump({name: {"host": "127.0.0.1:1", "layers": found} for name, found in layers.items()}))
    command = ["split-model", "--model", str(folder), "--topology", str(topology), "--output", str(out)]
    subprocess.run([sys.executable, "-m", "cake_core", *command], env={**os.environ, "CAKE_PLUGINS": "sd,tcp"}, check=True)
    expected = kit.pictures(kit.plain(folder), 7, prompt="a red apple", width=64, height=48, num_inference_steps=3)
    shutil.rmtree(folder)
    held = {name: {path.parent.name for path in (out / f"{name}-node").rglob("*.safetensors")} for name in (*layers, "master")}
    assert held == {"w0": {"unet"}, "w1": {"text_encoder", "vae"}, "master": set()}
    started = [Worker(tmp_path, name, out / f"{name}-node") for name in layers]
    try:
        entries = {worker.name: {"host": f"127.0.0.1:{worker.port}", "layers": layers[worker.name]} for worker in started}
        with master(out / "master-node/model", entries) as runtime:
            assert paint(runtime) == expected
    finally:
        for worker in started:
            worker.end()
