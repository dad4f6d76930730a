"""How fast a device serves a stage, measured with stages: what the planner stands on.

Three figures of one line, `seconds of a decode step = overhead + layers x layer overhead + bytes / rate`, from three stages:
few thin layers, many of them, and thick ones. Thin layers take longer than their bytes say, as every product begins and ends
by itself. The thick ones are measured at every width that the device has a way of its own for, and with a prompt chunk, which
gives the arithmetic. Before each step on a CPU the caches are filled with something else, as the rest of a model that is read
between two tokens does: without that few layers take half the time, and thick ones two thirds.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from cake_core.caches import sweep
from cake_core.model import Batch, LoadOptions, Row, SessionSpec, Tensor, TextStage
from cake_core.profiles import DeviceProfile
from cake_core.requests import SamplingParams
from cake_llama.cpu.loader import has_kernels
from cake_llama.loading import choose_device, choose_dtypes
from cake_llama.memory import available_bytes, total_bytes
from cake_llama.profile_weights import ProfileCheckpoint, Size
from cake_llama.wire import FROM_TORCH

Between = Callable[[], object]

FEW = {"cpu": Size(512, 1536, 5, 8, 2), "cuda": Size(128, 128, 1, 2, 1)}
MANY = {"cpu": Size(512, 1536, 20, 8, 2), "cuda": Size(128, 128, 24, 2, 1)}
THICK = {"cpu": Size(1024, 4096, 6, 8, 2), "cuda": Size(4096, 14336, 4, 32, 8, 1024)}
SECONDS = 0.25
"""How long one figure is measured: at least `LEAST` steps, unless they take three times as long."""
LEAST = 3


@dataclass(frozen=True, slots=True)
class _Measured:
    """A stage: seconds of a decode step, bytes of its weights and their number, its layers."""

    step: float
    nbytes: int
    parameters: int
    layers: int
    chunk: float = 0.0


def profile(options: LoadOptions, known: DeviceProfile | None) -> DeviceProfile:
    """The device of `options`, measured within about three seconds with its threads; of a known one the free memory only."""
    device = choose_device(options.device)
    if known is not None and known.device == str(device):
        return replace(known, memory_free=available_bytes(device))
    bench = _Bench(device, options)
    few, many = bench.measure(bench.few), bench.measure(bench.many)
    thick = {width: bench.measure(bench.thick, width, chunk=True) for width in _widths(device)}
    overhead, each = _overheads(few, many, thick["bf16"])
    rates = {width: _rate(found, overhead + found.layers * each) for width, found in thick.items()}
    return DeviceProfile(
        device=str(device),
        memory_free=available_bytes(device),
        bandwidth=rates["bf16"],
        dtype=FROM_TORCH[choose_dtypes("bf16", device, exactly=False).computed],
        memory_total=total_bytes(device),
        overhead=overhead,
        layer_overhead=each,
        flops={width: 2 * found.parameters * bench.thick.chunk / found.chunk for width, found in thick.items()},
        rates=rates,
        model=_model(device),
    )


def _widths(device: torch.device) -> Sequence[str]:
    """What the device multiplies at its own width: plain weights everywhere, narrow ones with cake-kernels."""
    return ("bf16", "int8", "int4") if device.type == "cpu" and has_kernels() else ("bf16",)


def _overheads(few: _Measured, many: _Measured, thick: _Measured) -> tuple[float, float]:
    """Seconds a call, which is what no layer would take, and a layer, which is what no bytes would."""
    thin = max(0.0, many.step - few.step) / (many.layers - few.layers)
    overhead = max(0.0, few.step - few.layers * thin)
    nbytes = (many.nbytes - few.nbytes) / (many.layers - few.layers)
    each = (thin * thick.nbytes - (thick.step - overhead) * nbytes) / (thick.nbytes - thick.layers * nbytes)
    return overhead, min(max(0.0, each), thin)


def _rate(found: _Measured, beside: float) -> float:
    return found.nbytes / max(found.step - beside, 0.2 * found.step)


class _Bench:
    """Loads stages of a device and measures them."""

    def __init__(self, device: torch.device, options: LoadOptions) -> None:
        self.few, self.many, self.thick = (sizes.get(device.type, sizes["cpu"]) for sizes in (FEW, MANY, THICK))
        self._device, self._options = device, options
        self._between: Between = sweep() if device.type == "cpu" else lambda: None

    def measure(self, size: Size, width: str = "bf16", chunk: bool = False) -> _Measured:
        stage, parameters = self._loaded(size, width)
        try:
            step = _median(_steps(stage, size.hidden, 1, self._between))
            nbytes = stage.memory().weights
            chunk_seconds = _median(_steps(stage, size.hidden, size.chunk, self._between)) if chunk else 0.0
            return _Measured(step, nbytes, parameters, size.layers, chunk_seconds)
        finally:
            stage.shutdown()

    def _loaded(self, size: Size, width: str) -> tuple[TextStage, int]:
        from cake_llama.backend import LlamaBackend

        backend, checkpoint = LlamaBackend(), ProfileCheckpoint(size, width)
        how = replace(
            self._options, device=str(self._device), dtype="auto", quantize=None, context=None, kv_tokens=4 * size.chunk,
            kv_dtype="auto",
        )  # fmt: skip
        info = backend.describe(checkpoint, how)
        names = [layer.name for layer in info.layers if layer.kv_bytes_per_token]
        parameters = sum(info.layer(name).flops_per_token for name in names) // 2
        return backend.load(checkpoint, info, names, how), parameters


def _steps(stage: TextStage, hidden: int, positions: int, between: Between) -> Iterator[float]:
    """Seconds of one batch after another, as the stage is called in a cluster: hidden states from the host and back."""
    data = array("f", [1.0, -1.0] * (positions * hidden // 2)).tobytes()
    tensors = {"hidden": Tensor("f32", (positions, hidden), data)}
    stage.close(1)
    stage.open(1, SessionSpec(SamplingParams()))
    while True:
        between()
        began = time.perf_counter()
        stage.submit(Batch((Row(1, 0, positions),), tensors)).result()
        yield time.perf_counter() - began
        stage.truncate(1, 0)


def _median(steps: Iterator[float]) -> float:
    """Of as many as go into the time, after some to warm up."""
    began = time.perf_counter()
    next(steps)
    next(steps)
    taken: list[float] = []
    while (passed := time.perf_counter() - began) < SECONDS or len(taken) < (LEAST if passed < 3 * SECONDS else 1):
        taken.append(next(steps))
    return sorted(taken)[len(taken) // 2]


def _model(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        import platform

        return platform.processor()
