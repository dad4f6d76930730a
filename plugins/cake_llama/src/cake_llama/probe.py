"""How fast a device is: what the floors of `cake bench` and the planner stand on. Measured, not from a data sheet."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from cake_core.model import LoadOptions
from cake_llama.loading import choose_device
from cake_llama.weights import TORCH_DTYPES


def probe(options: LoadOptions) -> Mapping[str, float]:
    """`memory_bandwidth` in bytes/s read, `matmul` in floating-point operations/s, of the device and dtype of `options`.

    On a GPU bandwidth is that of a copy, bytes read and written counted; on a CPU that of a matrix-vector product, which
    reads only, as decoding does.
    """
    device = choose_device(options.device)
    dtype = TORCH_DTYPES.get(options.dtype, torch.bfloat16 if device.type == "cuda" else torch.float32)
    if options.threads:
        torch.set_num_threads(options.threads)
    with torch.inference_mode():
        return {"memory_bandwidth": _bandwidth(device, dtype), "matmul": _matmul(device, dtype)}


def _bandwidth(device: torch.device, dtype: torch.dtype) -> float:
    if device.type != "cpu":
        source = torch.empty(1 << 30, dtype=torch.uint8, device=device).random_()
        target = torch.empty_like(source)
        return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device)
    matrix = torch.randn(8192, 4096).to(dtype)
    vector = torch.randn(4096).to(dtype)
    return matrix.nbytes / _best_seconds(lambda: torch.mv(matrix, vector), device)


def _matmul(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: a @ b, device)


def _best_seconds(work: Callable[[], object], device: torch.device, seconds: float = 0.5) -> float:
    """The median of runs for about `seconds`, after two to warm up."""
    times: list[float] = []
    for _ in range(2):
        work()
    _wait(device)
    until = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < until:
        began = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "xpu":
        torch.xpu.synchronize(device)
