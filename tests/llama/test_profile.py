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
    monkeypatch.setitem(measuring.REAL, "cpu", measuring.Size(256, 512, 2, 2, 1, 16))


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
    monkeypatch.setattr(measuring, "_overheads", None)
    known = DeviceProfile("cpu", 1, 2.0, rates={"bf16": 2.0})
    found = LlamaBackend().profile(LoadOptions(device="cpu"), known)
    assert found.rates == known.rates
    assert found.memory_free > 1


def test_a_device_that_is_not_there_is_told():
    with pytest.raises(ConfigError, match="cuda:77"):
        LlamaBackend().profile(LoadOptions(device="cuda:77"))
