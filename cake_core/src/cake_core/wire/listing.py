"""What a batch's body holds, as the header lists it: each tensor's name, dtype and shape, one after another.

    tensor   name u8 | dtype u8 | dimensions u16 | each dimension u32

From one decode step to the next the listing is the same to the byte, so a listing is read, and written, once: both ways keep
the last few hundred that they met.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from cake_core.errors import ProtocolError
from cake_core.model import DTYPE_SIZES, Buffer, Tensor

MAX_TENSORS = 64
MAX_DIMENSIONS = 8
MAX_NAME = 64
_KEPT = 256

_TENSOR = struct.Struct("<BBH")
_NAMES = (
    "tokens", "hidden", "targets", "logprobs", "top_ids", "top_logprobs",
    "score_logprobs", "score_top_ids", "score_top_logprobs", "final",
)  # fmt: skip
_NAME_CODES = {name: code for code, name in enumerate(_NAMES)}
_DTYPES = tuple(DTYPE_SIZES)
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


@dataclass(frozen=True, slots=True)
class TensorHead:
    """A tensor in the body, before its bytes are read."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", math.prod(self.shape) * DTYPE_SIZES[self.dtype])


@dataclass(frozen=True, slots=True)
class Listing:
    """The tensors of a body, in order, and the bytes they take together."""

    heads: tuple[TensorHead, ...] = ()
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        """Raises ProtocolError for more tensors than there may be, and for one that is listed twice."""
        if len(self.heads) > MAX_TENSORS:
            raise ProtocolError(f"{len(self.heads)} tensors, over the limit of {MAX_TENSORS}")
        if len({head.name for head in self.heads}) < len(self.heads):
            raise ProtocolError("a tensor is listed twice")
        object.__setattr__(self, "nbytes", sum(head.nbytes for head in self.heads))

    def tensors(self, body: Buffer) -> dict[str, Tensor]:
        """The tensors in `body`, without copying it."""
        view, start, found = memoryview(body), 0, {}
        for head in self.heads:
            stop = start + head.nbytes
            found[head.name] = Tensor(head.dtype, head.shape, view[start:stop])
            start = stop
        return found


NO_TENSORS = Listing()


@lru_cache(_KEPT)
def read_listing(data: bytes) -> Listing:
    """The listing in the header of a batch. Raises ProtocolError."""
    heads: list[TensorHead] = []
    offset = 0
    try:
        while offset < len(data):
            name, dtype, dimensions = _TENSOR.unpack_from(data, offset)
            offset += _TENSOR.size
            if dimensions > MAX_DIMENSIONS:
                raise ProtocolError(f"a tensor of {dimensions} dimensions, over the limit of {MAX_DIMENSIONS}")
            shape = struct.unpack_from(f"<{dimensions}I", data, offset)
            offset += 4 * dimensions
            heads.append(TensorHead(_NAMES[name], _DTYPES[dtype], shape))
    except (struct.error, IndexError) as error:
        raise ProtocolError("a damaged list of tensors") from error
    return Listing(tuple(heads))


def write_listing(tensors: Mapping[str, Tensor]) -> bytes:
    return _written(tuple([(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]))


@lru_cache(_KEPT)
def _written(heads: tuple[tuple[str, str, tuple[int, ...]], ...]) -> bytes:
    parts = []
    for name, dtype, shape in heads:
        parts.append(_TENSOR.pack(_NAME_CODES[name], _DTYPE_CODES[dtype], len(shape)))
        parts.append(struct.pack(f"<{len(shape)}I", *shape))
    return b"".join(parts)


def read_fields(listed: Sequence[Any]) -> Listing:
    """The listing among the fields of a control message, as `tensor_fields` made it. Raises ProtocolError."""
    heads = []
    for entry in listed:
        if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], list)):
            raise ProtocolError("a damaged list of tensors")
        name, dtype, shape = entry
        if not (isinstance(name, str) and len(name) <= MAX_NAME and isinstance(dtype, str) and dtype in DTYPE_SIZES):
            raise ProtocolError("a tensor without name or with an unknown dtype")
        if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**32 for n in shape):
            raise ProtocolError(f"tensor {name!r} has an impossible shape")
        heads.append(TensorHead(name, dtype, tuple(shape)))
    return Listing(tuple(heads))


def tensor_fields(tensors: Mapping[str, Tensor]) -> tuple[list[list[Any]], list[Buffer]]:
    """How control messages list their tensors: [name, dtype, [dimensions]]; and the buffers of the body."""
    listed = [[name, tensor.dtype, list(tensor.shape)] for name, tensor in tensors.items()]
    return listed, [tensor.data for tensor in tensors.values() if tensor.nbytes]
