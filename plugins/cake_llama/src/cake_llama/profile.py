"""How fast a device serves a stage, measured with stages: what the planner stands on.

Three figures of one line, `seconds of a decode step = overhead + layers x layer overhead + bytes / rate`: a stage of one tiny
layer and one of many give the first two, as their weights take no time; a stage of a real shape, at every width that the
device has a way of its own for, gives the rate, and a prompt chunk through it the arithmetic.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cake_core.model import Batch, LoadOptions, Row, SessionSpec, Tensor, TextStage
from cake_core.profiles import DeviceProfile
from cake_core.requests import SamplingParams
from cake_llama.cpu.loader import has_kernels
from cake_llama.loading import choose_device, choose_dtypes
from cake_llama.memory import available_bytes, total_bytes
from cake_llama.narrow import quantized
from cake_llama.packed import Blocks, Groups, Packed, stored
from cake_llama.random_model import RandomCheckpoint, RandomWeights, llama_shape
from cake_llama.wire import FROM_TORCH


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of what is measured. `chunk`: prompt positions a batch."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    chunk: int = 128

    @property
    def config(self) -> dict[str, Any]:
        return llama_shape(self.hidden, self.inner, self.layers, self.heads, self.kv_heads, 512, torch_dtype="bfloat16")


TINY = Size(128, 128, 24, 2, 1)
REAL = {"cpu": Size(1024, 4096, 6, 8, 2), "cuda": Size(4096, 14336, 4, 32, 8, 1024)}
SECONDS = 0.25
"""How long one figure is measured."""
LEAST = 3
ROWS = 256
"""Rows that are narrowed, and repeated to make a matrix."""
KINDS = {"bf16": "BF16", "int8": "Q8_0", "int4": "G4"}


class ProfileCheckpoint(RandomCheckpoint):
    """Weights that are quick to make: one random matrix of each width, copied for every tensor."""

    def __init__(self, size: Size, kind: str) -> None:
        super().__init__(f"profile-{size.hidden}-{kind}", size.config)
        self.kind = kind

    def source(self, device: torch.device) -> RandomWeights:
        return CopiedWeights(self, device)


class CopiedWeights(RandomWeights):
    def __init__(self, checkpoint: ProfileCheckpoint, device: torch.device) -> None:
        super().__init__(checkpoint, device)
        self._kind = checkpoint.kind
        self._pools: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self._narrow: dict[int, Packed] = {}

    def load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        shape = self.shape(name)
        if len(shape) == 1:
            return super().load(name, dtype)
        return self._pool(shape[1], dtype)[: shape[0]].clone()

    def kind(self, name: str) -> str:
        return KINDS[self._kind] if len(self.shape(name)) == 2 else super().kind(name)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Packed:
        count, wide = self.shape(name)
        stop = count if stop is None else stop
        if self._kind == "bf16":
            return stored(self._pool(wide, torch.bfloat16)[start:stop].clone())
        if wide not in self._narrow:
            high = max(shape[0] for shape in map(self.shape, self.names()) if len(shape) == 2 and shape[1] == wide)
            self._narrow[wide] = _repeated(quantized(self._pool(wide, torch.float32)[:ROWS], self._kind), -(-high // ROWS))
        return self._narrow[wide].rows(start, stop)

    def _pool(self, wide: int, dtype: torch.dtype) -> torch.Tensor:
        if (wide, dtype) not in self._pools:
            high = max(shape[0] for shape in map(self.shape, self.names()) if len(shape) == 2 and shape[1] == wide)
            generator = torch.Generator(self._device).manual_seed(wide)
            made = torch.empty((high, wide), dtype=dtype, device=self._device)
            self._pools[wide, dtype] = made.normal_(0.0, wide**-0.5, generator=generator)
        return self._pools[wide, dtype]


def _repeated(rows: Packed, times: int) -> Packed:
    """Narrowing is slow, and what the numbers are does not matter."""
    match rows:
        case Blocks(kind, (high, wide), data):
            return Blocks(kind, (high * times, wide), data.repeat(times, 1))
        case Groups():
            codes, scales, zeros = (part.repeat(times, 1) for part in (rows.codes, rows.scales, rows.zeros))
            return replace(rows, codes=codes, scales=scales, zeros=zeros)
    raise TypeError(f"no narrow weights of {type(rows).__name__}")


def profile(options: LoadOptions, known: DeviceProfile | None) -> DeviceProfile:
    """The device of `options`, measured in a few seconds with its threads; of a known one the free memory only."""
    device = choose_device(options.device)
    if known is not None and known.device == str(device):
        return replace(known, memory_free=available_bytes(device))
    size = REAL.get(device.type, REAL["cpu"])
    overhead, layer_overhead = _overheads(device, options)
    rates, flops = {}, {}
    for width in _widths(device):
        step, chunk, weights, parameters = _measured(size, width, device, options)
        reading = step - overhead - size.layers * layer_overhead
        rates[width] = weights / max(reading, 0.2 * step)
        flops[width] = 2 * parameters * size.chunk / chunk
    return DeviceProfile(
        device=str(device),
        memory_free=available_bytes(device),
        bandwidth=rates["bf16"],
        dtype=FROM_TORCH[choose_dtypes("bf16", device, exactly=False).computed],
        memory_total=total_bytes(device),
        overhead=overhead,
        layer_overhead=layer_overhead,
        flops=flops,
        rates=rates,
        model=_model(device),
    )


def _widths(device: torch.device) -> Sequence[str]:
    """What the device multiplies at its own width: plain weights everywhere, narrow ones with cake-kernels."""
    return ("bf16", "int8", "int4") if device.type == "cpu" and has_kernels() else ("bf16",)


def _overheads(device: torch.device, options: LoadOptions) -> tuple[float, float]:
    many, one = (_step_seconds(TINY, "bf16", device, options, layers) for layers in (TINY.layers, 1))
    each = max(0.0, many - one) / (TINY.layers - 1)
    return max(0.0, one - each), each


def _step_seconds(size: Size, width: str, device: torch.device, options: LoadOptions, layers: int) -> float:
    stage, _ = _loaded(size, width, device, options, layers)
    try:
        return _median(_steps(stage, size.hidden, 1))
    finally:
        stage.shutdown()


def _measured(size: Size, width: str, device: torch.device, options: LoadOptions) -> tuple[float, float, int, int]:
    """Seconds of a decode step and of a prompt chunk, bytes of the weights, and their number."""
    stage, parameters = _loaded(size, width, device, options, size.layers)
    try:
        step = _median(_steps(stage, size.hidden, 1))
        return step, _median(_steps(stage, size.hidden, size.chunk)), stage.memory().weights, parameters
    finally:
        stage.shutdown()


def _loaded(size: Size, width: str, device: torch.device, options: LoadOptions, layers: int) -> tuple[TextStage, int]:
    from cake_llama.backend import LlamaBackend

    backend, checkpoint = LlamaBackend(), ProfileCheckpoint(size, width)
    how = replace(
        options, device=str(device), dtype="auto", quantize=None, context=None, kv_tokens=4 * size.chunk, kv_dtype="auto"
    )
    info = backend.describe(checkpoint, how)
    names = [layer.name for layer in info.layers if layer.kv_bytes_per_token][:layers]
    parameters = sum(info.layer(name).flops_per_token for name in names) // 2
    return backend.load(checkpoint, info, names, how), parameters


def _steps(stage: TextStage, hidden: int, positions: int) -> Iterator[float]:
    """Seconds of one batch after another, as the stage is called in a cluster: hidden states from the host and back."""
    data = array("f", [1.0, -1.0] * (positions * hidden // 2)).tobytes()
    tensors = {"hidden": Tensor("f32", (positions, hidden), data)}
    stage.close(1)
    stage.open(1, SessionSpec(SamplingParams()))
    while True:
        began = time.perf_counter()
        stage.submit(Batch((Row(1, 0, positions),), tensors)).result()
        yield time.perf_counter() - began
        stage.truncate(1, 0)


def _median(steps: Iterator[float]) -> float:
    """Of as many as go into the time, after some to warm up."""
    next(steps)
    next(steps)
    taken: list[float] = []
    until = time.perf_counter() + SECONDS
    while len(taken) < LEAST or time.perf_counter() < until:
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
