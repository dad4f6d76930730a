"""Finds GPUs without torch, and says what keeps the installed torch from using one, with the command that mends it."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WHEELS = "https://download.pytorch.org/whl"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU the operating system knows of. `capability` is NVIDIA's compute capability (9.0), None where unknown."""

    vendor: str
    name: str
    driver: str | None = None
    capability: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Wheel:
    """One flavour of torch wheels for CUDA: what drivers and architectures it runs on."""

    index: str
    min_driver: int
    capabilities: tuple[float, float]


WHEEL_TABLE = (
    Wheel("cu130", 580, (7.5, 12.1)),
    Wheel("cu128", 525, (7.0, 12.0)),
    Wheel("cu126", 525, (5.0, 9.0)),
)
"""Newest first. Drivers: NVIDIA's CUDA compatibility tables (every CUDA 12 runs on 525 and later); architectures: those
that PyTorch builds each flavour for."""


MIN_DRIVER = {11: 450, 12: 525, 13: 580}
"""Oldest driver for each major version of CUDA, by NVIDIA's rule that minor versions are compatible."""


def find_gpus() -> list[Gpu]:
    """NVIDIA's by nvidia-smi (which needs a working driver), else every vendor's by what is on the bus."""
    return _nvidia_smi() or pci_gpus() or _apple_gpus()


def _nvidia_smi() -> list[Gpu]:
    tool = shutil.which("nvidia-smi") or shutil.which("/usr/lib/wsl/lib/nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603 - found on PATH
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_nvidia_smi(done.stdout) if done.returncode == 0 else []


def parse_nvidia_smi(text: str) -> list[Gpu]:
    """From lines of `name, driver, capability`; an old nvidia-smi answers `[Not Supported]` for the last."""
    gpus = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 3:
            capability = float(cells[2]) if re.fullmatch(r"\d+\.\d+", cells[2]) else None
            gpus.append(Gpu("nvidia", cells[0], cells[1], capability))
    return gpus


def pci_gpus(root: Path = Path("/sys/bus/pci/devices")) -> list[Gpu]:
    """Display controllers and 3D accelerators of the three vendors whose cards torch can use (Linux only)."""
    vendors = {"0x10de": "nvidia", "0x1002": "amd", "0x8086": "intel"}
    gpus = []
    for device in sorted(root.glob("*")):
        try:
            kind, vendor = (device / "class").read_text().strip(), (device / "vendor").read_text().strip()
        except OSError:
            continue
        # An Intel display controller on bus 0 is the processor's own graphics.
        if kind.startswith("0x03") and vendor in vendors and not (vendor == "0x8086" and device.name.startswith("0000:00:")):
            gpus.append(Gpu(vendors[vendor], f"{vendors[vendor].upper()} GPU at {device.name}"))
    return gpus


def _apple_gpus() -> list[Gpu]:
    return [Gpu("apple", "Apple GPU")] if sys.platform == "darwin" and platform.machine() == "arm64" else []


def diagnose(gpus: Sequence[Gpu], torch: Mapping[str, Any]) -> list[str]:
    """What stands between each GPU and torch, a sentence with its remedy each; nothing where all is well.

    `torch` is the answer of `machine.probe_torch`.
    """
    if not torch.get("version"):
        return [f"torch cannot be used: {torch.get('error', 'unknown reason')}"]
    problems = []
    for gpu in dict.fromkeys(gpus):
        found = {
            "nvidia": _diagnose_nvidia,
            "amd": _diagnose_amd,
            "intel": _diagnose_intel,
            "apple": _diagnose_apple,
        }[gpu.vendor](gpu, torch)
        if found:
            problems.append(f"{gpu.name} cannot be used: {found}")
    return problems


def _diagnose_nvidia(gpu: Gpu, torch: Mapping[str, Any]) -> str | None:
    if gpu.driver is None:
        return "its driver is not installed or not loaded; install it (Ubuntu: `sudo ubuntu-drivers install`), then restart"
    driver = _major(gpu.driver)
    wheel = best_wheel(driver, gpu.capability)
    if wheel is None:
        return _no_wheel(gpu)
    command = f"`{reinstall(wheel.index)}`"
    if not torch.get("cuda"):
        return f"the installed torch {torch['version']} is a build without CUDA; {command}"
    needed = MIN_DRIVER.get(_major(torch["cuda"]), 0)
    if driver < needed:
        return f"torch {torch['version']} needs driver {needed} or later, this is {gpu.driver}; {command}, or update the driver"
    if gpu.capability is not None and torch.get("arch_list") and not supports(torch["arch_list"], gpu.capability):
        built = ", ".join(torch["arch_list"])
        return f"torch {torch['version']} has no code for compute capability {gpu.capability} (it has {built}); {command}"
    if any(d["device"].startswith("cuda") for d in torch.get("devices", ())):
        return None
    if torch.get("visible_devices") is not None:
        return f"CUDA_VISIBLE_DEVICES is {torch['visible_devices']!r}, which hides it; unset it"
    reason = torch.get("cuda_error") or torch.get("cuda_warning") or "it sees no CUDA device"
    return f"torch {torch['version']} cannot start it: {reason}; see whether `nvidia-smi` works, and restart the machine"


def _major(version: str) -> int:
    match = re.match(r"\d+", version)
    return int(match[0]) if match else 0


def best_wheel(driver: int, capability: float | None) -> Wheel | None:
    """The newest flavour that runs on a driver and an architecture (unknown: any)."""
    for wheel in WHEEL_TABLE:
        low, high = wheel.capabilities
        if driver >= wheel.min_driver and (capability is None or low <= capability <= high):
            return wheel
    return None


def _no_wheel(gpu: Gpu) -> str:
    if gpu.capability is not None and gpu.capability < min(wheel.capabilities[0] for wheel in WHEEL_TABLE):
        return f"its compute capability {gpu.capability} is older than any current torch supports; use `--device cpu`"
    fitting = [w.min_driver for w in WHEEL_TABLE if gpu.capability is None or gpu.capability <= w.capabilities[1]]
    needed = min(fitting, default=WHEEL_TABLE[0].min_driver)
    return f"driver {gpu.driver} is too old; install NVIDIA's driver {needed} or later (Ubuntu: `sudo ubuntu-drivers install`)"


def supports(arch_list: Sequence[str], capability: float) -> bool:
    """Whether code of a torch build runs: a binary of the same major version and no newer minor one, or any older PTX."""
    major, minor = divmod(round(capability * 10), 10)
    for name in arch_list:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name)
        if match is None:
            continue
        has = (int(match[2]), int(match[3]))
        if (match[1] == "sm" and has[0] == major and has[1] <= minor) or (match[1] == "compute" and has <= (major, minor)):
            return True
    return False


def _diagnose_amd(gpu: Gpu, torch: Mapping[str, Any]) -> str | None:  # noqa: ARG001 - the table's signature
    if any(d["device"].startswith("cuda") for d in torch.get("devices", ())):
        return None
    if torch.get("hip"):
        return f"torch {torch['version']} is a ROCm build but sees no device; add yourself to the groups render and video"
    return f"the installed torch {torch['version']} is a build without ROCm; `{reinstall('rocm6.4')}`"


def _diagnose_intel(gpu: Gpu, torch: Mapping[str, Any]) -> str | None:  # noqa: ARG001 - the table's signature
    if any(d["device"].startswith("xpu") for d in torch.get("devices", ())):
        return None
    return f"the installed torch {torch['version']} sees no XPU; `{reinstall('xpu')}`"


def _diagnose_apple(gpu: Gpu, torch: Mapping[str, Any]) -> str | None:  # noqa: ARG001 - the table's signature
    if any(d["device"] == "mps" for d in torch.get("devices", ())):
        return None
    return "torch offers no MPS here; it needs macOS 14 or later, and Python and torch built for arm64 (`pip install -U torch`)"


def reinstall(index: str) -> str:
    """The command that swaps torch for another flavour, in this very Python."""
    return f"{Path(sys.executable).name} -m pip install --force-reinstall torch --index-url {WHEELS}/{index}"
