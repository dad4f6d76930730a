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
    host = tensor.detach().to("cpu").contiguous()
    data = bytes_of(host) if host.numel() else b""
    return Tensor(FROM_TORCH[host.dtype], tuple(host.shape), data)


def from_wire(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A torch tensor on `device`, sharing memory where it stays on the host with its dtype. Raises StageError."""
    kind = TO_TORCH.get(tensor.dtype)
    if kind is None:
        raise StageError(f"a {tensor.dtype} tensor cannot be used here")
    view = memoryview(tensor.data).cast("B")
    if not view.nbytes:
        return torch.empty(tensor.shape, dtype=dtype or kind, device=device)
    # torch wants memory it may write to; what the wire delivers is, bytes from elsewhere are copied.
    buffer = bytearray(view) if view.readonly else view
    host = torch.frombuffer(buffer, dtype=torch.uint8).view(kind).view(tensor.shape)
    return host.to(device=device, dtype=dtype or kind)
