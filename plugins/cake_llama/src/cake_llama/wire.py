"""Between torch tensors and the values that cross nodes, without copying on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch

from cake_core.errors import StageError
from cake_core.model import Buffer, Tensor

TO_TORCH: Mapping[str, torch.dtype] = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "f8e4m3": torch.float8_e4m3fn, "i64": torch.int64, "i32": torch.int32, "u8": torch.uint8,
}  # fmt: skip
FROM_TORCH = {dtype: name for name, dtype in TO_TORCH.items()}


def bytes_of(host: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host, not copied."""
    return memoryview(cast("Buffer", host.view(-1).view(torch.uint8).numpy()))


def to_wire(tensor: torch.Tensor) -> Tensor:
    """The bytes of a tensor; memory is shared with it when it is on the host and contiguous."""
    return host_to_wire(tensor.detach().to("cpu").contiguous())


def host_to_wire(host: torch.Tensor) -> Tensor:
    """The same of a tensor that is on the host and contiguous."""
    return Tensor(FROM_TORCH[host.dtype], tuple(host.shape), bytes_of(host) if host.numel() else b"")


_STAGED = 64 * 1024
"""Bytes up to which CUDA takes a copy from ordinary memory at once, whatever the device has under way."""


def on_host(tensor: Tensor, for_device: bool = False) -> torch.Tensor:
    """A torch tensor that shares the memory; or `for_device`, one from which a copy to a device, without waiting, does not hold
    up the caller until that has done all it was given before. Raises StageError."""
    kind = TO_TORCH.get(tensor.dtype)
    if kind is None:
        raise StageError(f"a {tensor.dtype} tensor cannot be used here")
    view = memoryview(tensor.data).cast("B")
    if not view.nbytes:
        return torch.empty(tensor.shape, dtype=kind)
    # torch wants memory it may write to; what the wire delivers is, bytes from elsewhere are copied.
    buffer = bytearray(view) if view.readonly else view
    host = torch.frombuffer(buffer, dtype=torch.uint8).view(kind).view(tensor.shape)
    if not for_device or view.nbytes <= _STAGED:
        return host
    locked = torch.empty(tensor.shape, dtype=kind, pin_memory=True)
    bytes_of(locked)[:] = view  # not by torch, which would wake a thread on every core for it
    return locked


def from_wire(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A torch tensor on `device`, sharing memory where it stays on the host with its dtype. Raises StageError."""
    if device.type == "cuda":
        there = on_host(tensor, for_device=True).to(device, non_blocking=True)
        return there if dtype is None else there.to(dtype)
    return on_host(tensor).to(device=device, dtype=dtype)


SCALED = "f8e4m3"
"""The narrowest hidden states: a position's values over a scale of its own, after them the scale's four bytes (f32). For
prompts, which are long: what tokens are drawn from right away is short and keeps its stage's own dtype."""

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def hidden_to_wire(hidden: torch.Tensor, wire_dtype: str) -> Tensor:
    """Hidden states [T, width] as they leave a stage."""
    return to_wire(as_sent(hidden, wire_dtype))


def as_sent(hidden: torch.Tensor, wire_dtype: str) -> torch.Tensor:
    """The same where they are: [T, width], or with SCALED [T, width + 4]."""
    if wire_dtype != SCALED:
        return hidden.to(TO_TORCH[wire_dtype])
    values = hidden.to(torch.float32)
    scale = values.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
    narrow = (values / scale).to(torch.float8_e4m3fn)
    return torch.cat([narrow.view(torch.uint8), scale.view(torch.uint8)], dim=1).view(torch.float8_e4m3fn)


def hidden_from_wire(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The inverse, as `dtype` on `device`. Raises StageError."""
    if tensor.dtype != SCALED:
        return from_wire(tensor, device, dtype)
    packed = from_wire(tensor, device)
    scale = packed[:, -4:].contiguous().view(torch.float32)
    return (packed[:, :-4].to(torch.float32) * scale).to(dtype)
