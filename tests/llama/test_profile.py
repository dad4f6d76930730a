"""What cake-llama measures of a device: figures of every width, and only the memory the second time."""

from __future__ import annotations

import pytest

from cake_core.errors import ConfigError
from cake_core.model import LoadOptions
from cake_core.profiles import DeviceProfile, Profiler
from cake_llama import profile as measuring
from cake_llama.backend import LlamaBackend
from cake_llama.cpu.loader import has_kernels


@pytest.fixture(autouse=True)
def little(monkeypatch):
    monkeypatch.setattr(measuring, "SECONDS", 0.01)
    monkeypatch.setitem(measuring.FEW, "cpu", measuring.Size(128, 256, 1, 2, 1, 16))
    monkeypatch.setitem(measuring.MANY, "cpu", measuring.Size(128, 256, 4, 2, 1, 16))
    monkeypatch.setitem(measuring.THICK, "cpu", measuring.Size(256, 512, 2, 2, 1, 16))


def test_every_width_of_the_device_is_measured():
    backend = LlamaBackend()
    assert isinstance(backend, Profiler)
    found = backend.profile(LoadOptions(device="cpu", threads=1))
    widths = {"bf16", "int8", "int4"} if has_kernels() else {"bf16"}
    assert set(found.rates) == set(found.flops) == widths
    assert found.device == "cpu"
    assert 0 < found.memory_free <= found.memory_total
    assert 1e7 < found.bandwidth == found.rates["bf16"] < 1e13
    assert 0 <= found.layer_overhead < 0.1
    assert 0 < found.overhead < 1


def test_of_a_known_device_only_the_memory_is_asked(monkeypatch):
    monkeypatch.setattr(measuring, "_Bench", None)
    known = DeviceProfile("cpu", 1, 2.0, rates={"bf16": 2.0})
    found = LlamaBackend().profile(LoadOptions(device="cpu"), known)
    assert found.rates == known.rates
    assert found.memory_free > 1


def test_a_device_that_is_not_there_is_told():
    with pytest.raises(ConfigError, match="cuda:77"):
        LlamaBackend().profile(LoadOptions(device="cuda:77"))


@pytest.mark.parametrize("overhead", [0.0, 3e-4])
@pytest.mark.parametrize("each", [0.0, 2e-5])
def test_a_straight_line_is_found_again(overhead, each):
    def stage(layers, nbytes):
        return measuring._Measured(overhead + layers * (each + nbytes / 4e10), layers * nbytes, 1, layers)

    few, many, thick = stage(5, 6_000_000), stage(20, 6_000_000), stage(6, 30_000_000)
    assert measuring._overheads(few, many, thick) == pytest.approx((overhead, each), abs=1e-9)
    assert measuring._rate(thick, overhead + 6 * each) == pytest.approx(4e10)


def test_a_disturbed_measurement_gives_no_negative_figure():
    slow, fast = measuring._Measured(3e-3, 10_000_000, 1, 5), measuring._Measured(1e-3, 40_000_000, 1, 20)
    thick = measuring._Measured(1e-4, 180_000_000, 1, 6)
    overhead, each = measuring._overheads(slow, fast, thick)
    assert min(overhead, each) >= 0
    assert measuring._rate(thick, overhead + thick.layers * each) > 0
