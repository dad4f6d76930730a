"""What `cake doctor` says of GPUs that the installed torch cannot use: from facts, so that any machine can be told of."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cake_core.cli import gpu, machine
from cake_core.cli.main import make_cli
from cake_core.plugins import Plugins

H100 = gpu.Gpu("nvidia", "NVIDIA H100", "580.159.04", 9.0)
CPU_TORCH: dict[str, Any] = {"version": "2.13.0+cpu", "cuda": None, "devices": []}
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


def cuda_torch(cuda: str = "13.0", archs: list[str] | None = None, **more: Any) -> dict[str, Any]:
    devices = [{"device": "cuda:0"}]
    return {
        "version": f"2.13.0+cu{cuda.replace('.', '')}",
        "cuda": cuda,
        "arch_list": archs or CU130,
        "devices": devices,
        **more,
    }


def nvidia(driver: str | None, capability: float | None) -> gpu.Gpu:
    return gpu.Gpu("nvidia", "a card", driver, capability)


@pytest.mark.parametrize(
    ("card", "torch", "expected"),
    [
        (H100, CPU_TORCH, ("without CUDA", "/cu130`")),
        (nvidia("550.54", 8.9), CPU_TORCH, ("without CUDA", "/cu128`")),
        (nvidia("580.1", 6.1), CPU_TORCH, ("without CUDA", "/cu126`")),
        (nvidia("470.1", 8.6), CPU_TORCH, ("driver 470.1 is too old", "driver 525 or later")),
        (nvidia("470.1", 12.1), CPU_TORCH, ("driver 470.1 is too old", "driver 580 or later")),
        (nvidia("470.1", 3.5), CPU_TORCH, ("older than any current torch", "--device cpu")),
        (nvidia(None, None), CPU_TORCH, ("driver is not installed",)),
        (nvidia("550.54", 8.9), cuda_torch(), ("needs driver 580 or later, this is 550.54", "/cu128`")),
        (nvidia("580.1", 6.1), cuda_torch(), ("no code for compute capability 6.1", "/cu126`")),
        (H100, cuda_torch(devices=[], visible_devices=""), ("CUDA_VISIBLE_DEVICES is ''",)),
        (H100, cuda_torch(devices=[], cuda_error="unknown error"), ("cannot start it: unknown error", "nvidia-smi")),
        (gpu.Gpu("amd", "a card"), CPU_TORCH, ("without ROCm", "/rocm")),
        (gpu.Gpu("amd", "a card"), {**CPU_TORCH, "hip": "6.4"}, ("groups render and video",)),
        (gpu.Gpu("intel", "a card"), CPU_TORCH, ("sees no XPU", "/xpu`")),
        (gpu.Gpu("apple", "Apple GPU"), CPU_TORCH, ("macOS 14 or later",)),
    ],
)
def test_what_is_wrong_and_what_mends_it(card: gpu.Gpu, torch: dict[str, Any], expected: tuple[str, ...]) -> None:
    (problem,) = gpu.diagnose([card], torch)
    assert problem.startswith(f"{card.name} cannot be used: ")
    for part in expected:
        assert part in problem


@pytest.mark.parametrize(
    ("card", "torch"),
    [
        (H100, cuda_torch()),
        (nvidia("550.54", 8.9), cuda_torch("12.8", ["sm_80", "sm_86"])),
        (nvidia("580.1", None), cuda_torch()),
        (gpu.Gpu("amd", "a card"), {**CPU_TORCH, "hip": "6.4", "devices": [{"device": "cuda:0"}]}),
        (gpu.Gpu("intel", "a card"), {**CPU_TORCH, "devices": [{"device": "xpu:0"}]}),
        (gpu.Gpu("apple", "Apple GPU"), {**CPU_TORCH, "devices": [{"device": "mps"}]}),
    ],
)
def test_nothing_is_said_of_a_gpu_that_works(card: gpu.Gpu, torch: dict[str, Any]) -> None:
    assert gpu.diagnose([card], torch) == []


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["sm_80"], 8.6, True),
        (["sm_86"], 8.0, False),
        (["sm_80"], 9.0, False),
        (["compute_80"], 9.0, True),
        (["sm_90a"], 9.0, True),
        (["sm_100"], 10.0, True),
        (["nonsense"], 9.0, False),
        ([], 9.0, False),
    ],
)
def test_which_builds_run_where(archs: list[str], capability: float, runs: bool) -> None:
    assert gpu.supports(archs, capability) is runs


def test_what_nvidia_smi_prints() -> None:
    text = "NVIDIA H100 80GB HBM3, 580.159.04, 9.0\nOld card, 390.1, [Not Supported]\n\n"
    assert gpu.parse_nvidia_smi(text) == [
        gpu.Gpu("nvidia", "NVIDIA H100 80GB HBM3", "580.159.04", 9.0),
        gpu.Gpu("nvidia", "Old card", "390.1", None),
    ]


def test_cards_on_the_bus(tmp_path: Path) -> None:
    for name, kind, vendor in (
        ("0000:01:00.0", "0x030000", "0x10de"),
        ("0000:02:00.0", "0x030000", "0x1002"),
        ("0000:00:02.0", "0x030000", "0x8086"),
        ("0000:03:00.0", "0x030000", "0x8086"),
        ("0000:04:00.0", "0x020000", "0x10de"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "class").write_text(kind + "\n")
        (tmp_path / name / "vendor").write_text(vendor + "\n")
    assert [card.vendor for card in gpu.pci_gpus(tmp_path)] == ["nvidia", "amd", "intel"]


def test_a_machine_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe() -> dict[str, Any]:
        return {"error": "not installed; `pip install cake-llama` brings it"}

    monkeypatch.setattr(machine, "probe_torch", probe)
    monkeypatch.setattr(gpu, "find_gpus", lambda: [H100])
    result = CliRunner().invoke(make_cli(Plugins(entries=())), ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert any("pip install cake-llama" in problem for problem in report["problems"])
    assert [device["device"] for device in report["devices"]] == ["cpu"]
    assert report["gpus"][0]["capability"] == 9.0
    text = CliRunner().invoke(make_cli(Plugins(entries=())), ["doctor"])
    assert "problem: " in text.stdout
    assert "NVIDIA H100 (driver 580.159.04, sm 9.0)" in text.stdout


def test_torch_is_asked_in_a_process_of_its_own() -> None:
    before = set(sys.modules)
    found = machine.probe_torch()
    assert "torch" not in set(sys.modules) - before
    assert ("version" in found) != ("error" in found)
