"""Every family over QUIC, the denoiser on one worker and the rest on another: bit for bit what TCP gives."""

from __future__ import annotations

from typing import Any

import pytest

from cake_core.events import ImageDone
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.model import LoadOptions
from cake_core.plugins import Plugins
from cake_core.requests import ImageRequest
from cake_core.testing.cluster import LocalCluster
from cake_core.transport import Transport
from cake_sd import hooks

pytest.importorskip("qh3")
FAMILIES = ("sd15", "sd21", "sdxl", "turbo", "sd3", "flux", "pixart")
REQUEST = ImageRequest("a red apple", width=64, height=48, steps=2, seed=7, images=2)


def paint(folder: Any, transport: Transport) -> list[bytes]:
    plugins, checkpoint = Plugins(entries=()), DiffusersCheckpoint(folder)
    plugins.register("sd", hooks)
    options = LoadOptions(dtype="f32", device="cpu")
    names = [layer.name for layer in plugins.backends["sd"].describe(checkpoint, options).layers]
    denoiser = [name for name in names if name in ("unet", "transformer")]
    layers = {"w0": denoiser, "w1": [name for name in names if name not in denoiser]}
    with LocalCluster(plugins, checkpoint, transport, layers, options) as cluster:
        return [event.rgb for event in cluster.open_image().engine.generate(REQUEST) if isinstance(event, ImageDone)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_pictures_as_over_tcp(model: Any, family: str) -> None:
    from cake_transport_quic.transport import QuicTransport
    from cake_transport_tcp.transport import TcpTransport

    over_tcp = paint(model(family), TcpTransport())
    assert len(over_tcp) == 2
    assert paint(model(family), QuicTransport()) == over_tcp
