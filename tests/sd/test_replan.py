"""Components of a real pipeline whose node is lost for good: they go elsewhere, and the picture stays the same bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.core.farm import Farm

from cake_core.cluster import replan
from cake_core.events import ImageDone, ImageStep
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.model import LoadOptions
from cake_core.profiles import DeviceProfile, NodeProfile
from cake_core.requests import ImageRequest
from cake_core.runtime import ImageRuntime, RunSpec, open_image
from cake_core.testing.cluster import FAST
from cake_core.topology import MASTER, Node, Topology
from cake_sd import hooks

REQUEST = ImageRequest("a red apple", width=64, height=48, steps=5, seed=7)
ROOMY = NodeProfile(MASTER, (DeviceProfile("cpu", 1 << 30, 1e10),))


def paint(runtime: ImageRuntime, farm: Farm | None = None, lose: str = "") -> bytes:
    """The picture; after its second step the worker `lose` is ended."""
    events: list[Any] = []
    for event in runtime.engine.generate(REQUEST):
        events.append(event)
        if farm is not None and isinstance(event, ImageStep) and event.step == 2:
            farm.end(lose)
    (found,) = [event.rgb for event in events if isinstance(event, ImageDone)]
    return bytes(found)


@pytest.mark.full
def test_a_spare_worker_takes_over_and_then_the_master(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replan, "GRACE", 0.2)
    farm = Farm(tmp_path / "homes")
    farm.plugins.register("sd", hooks)
    checkpoint = DiffusersCheckpoint(model("sd15"))
    options = LoadOptions(dtype="f32", device="cpu")
    whole = open_image(farm.plugins, RunSpec(checkpoint, Topology(), options))
    expected = paint(whole)
    whole.close()
    for name, memory in (("a", 10), ("b", 10), ("c", 2 << 30)):
        farm.start(name, memory=memory)
    nodes = (Node("a", farm.address("a"), ("unet",)), Node("b", farm.address("b"), ("clip", "vae")))
    spec = RunSpec(
        checkpoint, Topology(nodes), options, farm.dial, timing=FAST, wait=5, rejoin=60.0, on_loss="replan",
        spares=(Node("c", farm.address("c"), ()),), profile=lambda _backend: ROOMY,
    )  # fmt: skip
    runtime = open_image(farm.plugins, spec)
    try:
        assert paint(runtime, farm, "a") == expected
        assert runtime.placement.layers_of("c") == ("unet",)
        assert paint(runtime, farm, "c") == expected
        assert runtime.placement.layers_of(MASTER) == ("unet",)
        assert paint(runtime, farm, "b") == expected
        assert runtime.placement.nodes == (MASTER,)
    finally:
        runtime.close()
        farm.close()
