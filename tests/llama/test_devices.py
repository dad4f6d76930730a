"""A model over several devices of one node: the tokens of one device, whatever the cut, plain and quantised."""

from __future__ import annotations

import pytest
import torch

from cake_core.errors import CapacityError
from cake_core.model import LoadOptions
from cake_core.stages.devices import load_text
from cake_core.stages.relay import Relay
from cake_core.testing.contracts.text_rig import GREEDY, SEEDED, Chain
from cake_llama.backend import LlamaBackend
from cake_llama.random_model import RandomCheckpoint

BACKEND = LlamaBackend()
PROMPT = [(7919 + 104729 * index) % 500 for index in range(40)]
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


def options_for(device: str, quantize: str | None) -> LoadOptions:
    return LoadOptions(dtype="f32" if quantize is None else "auto", device=device, kv_tokens=512, quantize=quantize)


def stage_on(device: str, quantize: str | None = None) -> Chain:
    checkpoint, options = RandomCheckpoint("tiny"), options_for(device, quantize)
    info = BACKEND.describe(checkpoint, options)
    return Chain([load_text(BACKEND, checkpoint, info, [layer.name for layer in info.layers], options)])


def first_holds(monkeypatch: pytest.MonkeyPatch, name: str, count: int, quantize: str | None = None) -> None:
    """The device `name` has room for as many layers as that, others for anything."""
    layers = BACKEND.describe(RandomCheckpoint("tiny"), options_for(name, quantize)).layers[:count]
    room = int(sum(layer.nbytes + 512 * layer.kv_bytes_per_token for layer in layers) / 0.9)
    monkeypatch.setattr("cake_llama.profile.available_bytes", lambda device: room if str(device) == name else 10**12)


@pytest.mark.parametrize("count", [1, 2])
def test_two_devices_draw_what_one_draws(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first_holds(monkeypatch, "cpu:0", count)
    one, two = stage_on("cpu"), stage_on("cpu:0,cpu")
    assert isinstance(two.stages[0], Relay)
    assert two.stages[0].memory().kv_tokens == 512
    for sampling in (GREEDY, SEEDED):
        assert two.generate(PROMPT, sampling, 12) == one.generate(PROMPT, sampling, 12)


def test_what_fits_no_device_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cake_llama.profile.available_bytes", lambda device: 1000)
    with pytest.raises(CapacityError, match="there is room on cpu:0"):
        stage_on("cpu:0,cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("devices", ["cuda:0,cuda:1", "cuda:1,cuda:0", "cuda:0,cpu"])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_gpus_draw_what_one_draws(devices: str, quantize: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = devices.split(",")
    if max(1, devices.count("cuda")) > GPUS:
        pytest.skip("needs as many CUDA devices")
    first_holds(monkeypatch, first, 2, quantize)
    one, two = stage_on(first, quantize), stage_on(devices, quantize)
    assert isinstance(two.stages[0], Relay)
    found, expected = (chain.generate(PROMPT, GREEDY, 12) for chain in (two, one))
    # A CPU rounds narrow weights in its own way, and random weights are drawn by the device that they are for.
    if second != "cpu":
        assert found == expected
    assert len(found) == 12
