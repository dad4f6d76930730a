"""Between torch tensors and what crosses nodes: `Tensor`s, plain scalars and constants.

Arguments of a component form a tree of mappings, lists, tensors and plain values. It is flattened to names like
`added_cond_kwargs/text_embeds`; a tensor whose few elements are all equal (a timestep, a guidance scale) travels as a scalar.

A tensor's memory format goes with it, in its name: convolutions round differently on channels-last memory, and a split model
must paint the same bits as a whole one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from cake_core.errors import ProtocolError
from cake_core.model import Tensor

DTYPES: Mapping[str, torch.dtype] = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool,
}  # fmt: skip
NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

_UNIFORM = 64  # a tensor of at most so many equal elements travels as one number
_CHANNELS_LAST = "@channels_last"
_FILL, _MAP, _LIST = "fill", "map", "list"


def to_wire(tensor: torch.Tensor) -> Tensor:
    """A copy in host memory only where the tensor is not there already, or not contiguous."""
    name = NAMES.get(tensor.dtype)
    if name is None:
        raise ProtocolError(f"{tensor.dtype} does not cross nodes; use {', '.join(NAMES.values())}")
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().data if flat.numel() else b""
    return Tensor(name, tuple(tensor.shape), data)


def from_wire(tensor: Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """Shares the received memory where it may be written to, else copies."""
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise ProtocolError(f"{tensor.dtype} tensors are not used by image models")
    if not tensor.nbytes:
        return torch.empty(tensor.shape, dtype=dtype, device=device)
    view = memoryview(tensor.data)
    data = bytearray(view) if view.readonly else view
    return torch.frombuffer(data, dtype=dtype).reshape(tensor.shape).to(device)


def arranged(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """The tensor in the order of its memory, and the name that says so."""
    if tensor.ndim == 4 and tensor.shape[1] > 1 and tensor.stride(1) == 1 and not tensor.is_contiguous():
        return name + _CHANNELS_LAST, tensor.permute(0, 2, 3, 1)
    return name, tensor


def _as_sent(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not name.endswith(_CHANNELS_LAST):
        return tensor
    if tensor.ndim != 4:
        raise ProtocolError(f"{name} has {tensor.ndim} dimensions, which cannot be channels-last")
    return tensor.permute(0, 3, 1, 2)


def pack_results(results: Mapping[str, torch.Tensor]) -> dict[str, Tensor]:
    """What a component hands back, as it crosses nodes."""
    return {key: to_wire(value) for key, value in (arranged(name, value) for name, value in results.items())}


def unpack_results(results: Mapping[str, Tensor], device: torch.device | str) -> dict[str, torch.Tensor]:
    return {
        name.removesuffix(_CHANNELS_LAST): _as_sent(name, from_wire(value, device)) for name, value in results.items()
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Packed:
    """Arguments as `Component.call` takes them."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)


class Packer:
    """Flattens arguments, and knows from earlier calls of one request which of them are constants.

    A tensor under a name is a constant until the name has shown more than `MAX_VALUES` different contents: prompt
    embeddings come as one or two, a changing input as one a step. The wire form of a constant is kept, so the very same
    object goes out each step and a remote component can know it without looking at its bytes.
    """

    MAX_VALUES = 4

    def __init__(self, changing: frozenset[str]) -> None:
        self._changing = set(changing)
        self._known: dict[str, list[_Constant]] = {}

    def pack(self, arguments: Mapping[str, Any]) -> Packed:
        packed = Packed()
        for name, value in arguments.items():
            self._add(packed, name, value)
        return packed

    def _add(self, packed: Packed, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._add_tensor(packed, name, value)
        elif isinstance(value, Mapping):
            packed.scalars[name] = {_MAP: list(value)}
            for key, item in value.items():
                self._add(packed, f"{name}/{key}", item)
        elif isinstance(value, (list, tuple)):
            packed.scalars[name] = {_LIST: len(value)}
            for index, item in enumerate(value):
                self._add(packed, f"{name}/{index}", item)
        elif value is None or isinstance(value, (bool, int, float, str)):
            packed.scalars[name] = value
        else:
            raise ProtocolError(f"argument {name!r} is a {type(value).__name__}, which cannot cross nodes; drop the option")

    def _add_tensor(self, packed: Packed, name: str, value: torch.Tensor) -> None:
        number = uniform(value)
        if number is not None:
            packed.scalars[name] = {_FILL: [NAMES[value.dtype], list(value.shape), number]}
            return
        key, value = arranged(name, value)
        constant = None if name in self._changing else self._constant(name, value)
        if constant is None:
            packed.tensors[key] = to_wire(value)
        else:
            packed.constants[key] = constant

    def _constant(self, name: str, value: torch.Tensor) -> Tensor | None:
        known = self._known.setdefault(name, [])
        for constant in known:
            if constant.is_(value):
                return constant.wire
        if len(known) == self.MAX_VALUES:
            self._changing.add(name)
            del self._known[name]
            return None
        copy = value.detach().clone()
        known.append(_Constant(value, value._version, copy, to_wire(copy)))
        return known[-1].wire


@dataclass(frozen=True, slots=True)
class _Constant:
    """A tensor as it was when it was first seen. `source` is held so that its identity is not reused."""

    source: torch.Tensor
    version: int
    copy: torch.Tensor
    wire: Tensor

    def is_(self, value: torch.Tensor) -> bool:
        if self.source is value and self.version == value._version:
            return True
        return self.copy.shape == value.shape and self.copy.dtype == value.dtype and torch.equal(self.copy, value)


def uniform(value: torch.Tensor) -> float | int | bool | None:
    """The number that a small tensor consists of; None for a large one or one of several numbers (or of NaN)."""
    if not 0 < value.numel() <= _UNIFORM or value.dtype not in NAMES:
        return None
    flat = value.detach().reshape(-1).to("cpu")
    first: float | int | bool = flat[0].item()
    return first if bool((flat == first).all()) else None


def unpack(packed: Packed, device: torch.device | str) -> dict[str, Any]:
    """The arguments that `Packer.pack` flattened, with their tensors on `device`. Raises ProtocolError for nonsense."""
    names = [name.removesuffix(_CHANNELS_LAST) for name in (*packed.tensors, *packed.scalars, *packed.constants)]
    return {name: _take(packed, name, device) for name in names if "/" not in name}


def _take(packed: Packed, name: str, device: torch.device | str) -> Any:
    for group in (packed.tensors, packed.constants):
        for key in (name, name + _CHANNELS_LAST):
            if key in group:
                return _as_sent(key, from_wire(group[key], device))
    if name not in packed.scalars:
        raise ProtocolError(f"argument {name!r} is missing")
    value = packed.scalars[name]
    if not isinstance(value, Mapping):
        return value
    if len(value) == 1:
        kind, content = next(iter(value.items()))
        if kind == _MAP and isinstance(content, list):
            return {key: _take(packed, f"{name}/{key}", device) for key in content}
        if kind == _LIST and isinstance(content, int):
            return [_take(packed, f"{name}/{index}", device) for index in range(content)]
        if kind == _FILL and isinstance(content, (list, tuple)) and len(content) == 3 and content[0] in DTYPES:
            return torch.full(tuple(content[1]), content[2], dtype=DTYPES[content[0]], device=device)
    raise ProtocolError(f"argument {name!r} has an unknown form")
