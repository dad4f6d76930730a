"""What this machine has, asked without importing anything heavy: torch is asked in a process of its own."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cake_core.cluster.probing import Prober
    from cake_core.model import LoadOptions
    from cake_core.plugins import Plugins
    from cake_core.profiles import DeviceProfile

INTERESTING = (
    "torch",
    "transformers",
    "diffusers",
    "huggingface-hub",
    "tokenizers",
    "llguidance",
    "triton",
    "click",
    "pluggy",
    "cbor2",
)
"""Distributions whose version matters in a report, beside Cake's own."""

# Runs in a child process: importing torch takes seconds and gigabytes of address space, and a broken installation may crash.
_PROBE = """
import json, os, sys
try:
    import torch
except BaseException as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
    sys.exit()
out = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": getattr(torch.version, "hip", None)}
out.update(arch_list=[], devices=[], visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"))
def device(name, kind, free, total, dtypes):
    out["devices"].append({"device": name, "name": kind, "free": free, "total": total, "dtypes": dtypes})
try:
    import warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            out["arch_list"] = torch.cuda.get_arch_list()
            for i in range(torch.cuda.device_count()):
                p = torch.cuda.get_device_properties(i)
                free, total = torch.cuda.mem_get_info(i)
                dtypes = ["f32", "f16"] + (["bf16"] if p.major >= 8 else [])
                device(f"cuda:{i}", p.name, free, total, dtypes)
    out["cuda_warning"] = "; ".join(str(w.message) for w in caught) or None
except BaseException as error:
    out["cuda_error"] = str(error).splitlines()[0] if str(error) else type(error).__name__
if getattr(torch.backends, "mps", None) and torch.backends.mps.is_available():
    total = torch.mps.recommended_max_memory() if hasattr(torch.mps, "recommended_max_memory") else None
    device("mps", "Apple GPU", None, total, ["f32", "f16", "bf16"])
if hasattr(torch, "xpu") and torch.xpu.is_available():
    for i in range(torch.xpu.device_count()):
        p = torch.xpu.get_device_properties(i)
        device(f"xpu:{i}", p.name, None, p.total_memory, ["f32", "f16", "bf16"])
print(json.dumps(out))
"""


def probe_torch(timeout: float = 120) -> dict[str, Any]:
    """What torch says of itself and its devices; `error` alone when it is missing or broken."""
    try:
        done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=timeout, check=False)  # noqa: S603 - our own interpreter and text
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"importing torch took longer than {timeout:.0f} s"}
    except (ValueError, IndexError):
        return {"error": f"torch crashes on import: {done.stderr.strip()[-200:] or f'exit code {done.returncode}'}"}
    if str(found.get("error", "")).startswith("ModuleNotFoundError: No module named 'torch'"):
        return {"error": "not installed; `pip install cake-llama` brings it"}
    return found


def devices(torch: dict[str, Any]) -> list[dict[str, Any]]:
    """Devices models can be loaded on, the CPU last."""
    free, total = memory()
    cpu = {"device": "cpu", "name": cpu_name(), "free": free, "total": total, "dtypes": ["f32", "f16", "bf16"]}
    return [*torch.get("devices", ()), cpu]


def describe() -> dict[str, Any]:
    """Versions and the machine itself."""
    free, total = memory()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_free": free,
        "memory_total": total,
        "distributions": versions(),
    }


def versions() -> list[dict[str, str]]:
    """Cake's own distributions and the ones a bug report needs."""
    found = {}
    for distribution in distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if name.startswith("cake-") or name in INTERESTING:
            found[name] = distribution.version
    return [{"name": name, "version": found[name]} for name in sorted(found, key=lambda n: (not n.startswith("cake-"), n))]


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory() -> tuple[int | None, int | None]:
    """(available, total) bytes of main memory, None where the system does not tell."""
    if sys.platform == "win32":
        return _windows_memory()
    if sys.platform == "darwin":
        return None, _sysctl_memory()
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None, None
    values = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return _within_container(values.get("MemAvailable"), values.get("MemTotal"))


def _within_container(free: int | None, total: int | None) -> tuple[int | None, int | None]:
    """The same, no more than a container (cgroup v2) is allowed."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text("ascii"))
        used = int((group / "memory.current").read_text("ascii"))
    except (OSError, ValueError):
        return free, total
    if free is None or total is None or limit >= total:
        return free, total
    return min(free, max(limit - used, 0)), limit


def _windows_memory() -> tuple[int | None, int | None]:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "free", "a", "b", "c", "d", "e")),
        )

    status = Status()
    status.length = ctypes.sizeof(status)
    windll = getattr(ctypes, "windll", None)
    if windll is None or not windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None, None
    return int(status.free), int(status.total)


def _sysctl_memory() -> int | None:
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", "hw.memsize"], capture_output=True, text=True, timeout=5, check=True)
        return int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def prober(plugins: Plugins, options: LoadOptions) -> Prober:
    """Measures this machine, and keeps what it found in the cache folder."""
    from cake_core.cluster.probing import Prober
    from cake_core.config import load_options

    return Prober(plugins, options, load_options().cache_dir, plain_device)


def plain_device() -> DeviceProfile:
    """What is known of this machine without a model: its free memory, and how fast memory is read."""
    from cake_core.profiles import DeviceProfile

    free, total = memory()
    known = free if free is not None else int((total or 4 << 30) * 0.7)
    return DeviceProfile("cpu", known, _bandwidth(), memory_total=total or 0, model=cpu_name()[:200])


@functools.cache
def _bandwidth() -> float:
    """Bytes/s that one thread copies, the best of a few times."""
    source, nbytes = bytearray(64 << 20), 64 << 20
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        bytes(source)
        best = min(best, time.perf_counter() - began)
    return 2 * nbytes / best
