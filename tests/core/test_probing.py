"""This machine is measured once; what was kept is used, refreshed, and measured anew where it is of no use."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest

from cake_core.cluster.probing import FILE, Prober
from cake_core.errors import ConfigError
from cake_core.model import LoadOptions
from cake_core.plugins import Plugins
from cake_core.profiles import DeviceProfile

PLAIN = DeviceProfile("cpu", 5, 1e9)


@dataclass
class Measuring:
    """A backend that counts how often it measured."""

    name: str = "measuring"
    measured: list[str] = field(default_factory=list)
    free: int = 7

    def profile(self, options: LoadOptions, known: DeviceProfile | None = None) -> DeviceProfile:
        if options.device == "none":
            raise ConfigError("no such device")
        if known is not None:
            return replace(known, memory_free=self.free)
        self.measured.append(options.device)
        return DeviceProfile(options.device, self.free, 2e10, rates={"int4": 1e10})


@dataclass
class Registered:
    backends: dict[str, Any]


@pytest.fixture
def backend():
    return Measuring()


@pytest.fixture
def probe(backend, tmp_path):
    def probe(device: str = "cpu") -> Prober:
        plugins = cast("Plugins", Registered({"measuring": backend, "silent": object()}))
        return Prober(plugins, LoadOptions(device=device), tmp_path / "cache", lambda: PLAIN)

    return probe


def test_measured_once_and_memory_asked_anew(backend, probe):
    first = probe().node("n", "measuring")
    backend.free = 9
    second = probe().node("n", "measuring")
    assert backend.measured == ["cpu"]
    assert (first.devices[0].memory_free, second.devices[0].memory_free) == (7, 9)
    assert second.devices[0].rates == {"int4": 1e10}


def test_every_device_of_a_worker_is_measured(backend, probe):
    found = probe("gpu:0,cpu").node("n", "measuring")
    assert [device.device for device in found.devices] == ["gpu:0", "cpu"] == backend.measured


def test_without_a_backend_what_was_measured_last(probe):
    assert probe().node("n").devices == (PLAIN,)
    probe().node("n", "measuring")
    last = probe().node("n").devices[0]
    assert (last.bandwidth, last.memory_free) == (2e10, PLAIN.memory_free)


@pytest.mark.parametrize("name", ["silent", "unknown"])
def test_a_backend_that_does_not_measure_gets_what_is_known(probe, name):
    assert probe().node("n", name).devices == (PLAIN,)


def test_a_device_that_cannot_be_measured_is_no_end(probe, caplog):
    assert probe("none").node("n", "measuring").devices == (PLAIN,)
    assert "no such device" in caplog.text


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"x": 1}'])
def test_a_damaged_cache_is_measured_again(backend, probe, tmp_path, damage):
    probe().node("n", "measuring")
    (tmp_path / "cache" / FILE).write_text(damage)
    probe().node("n", "measuring")
    assert backend.measured == ["cpu", "cpu"]
