"""The messages between master and worker, as bytes. Pure: no socket, no clock, no thread.

A message is a header and a body (`transport.Channel` moves both). The header is a fixed 16-byte prefix and then, for
control messages, a small CBOR map without tags, or, for batches, fixed binary rows: a decode step costs no CBOR. The body
is the raw bytes of the tensors the header lists, one after another. Everything is little-endian.

    prefix   type u8 | stage u8 | rows u16 | request u32 | hops u64
    row      session u64 | position u32 | length u32 | sample u16 | top i16 | score_top u16 | flags u16
    flags    1 score | 2 hidden | 4 rewind
    tensor   name u8 | dtype u8 | dimensions u16 | each dimension u32

Nothing is allocated before the declared sizes have been checked against one another and against the limits.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import cbor2

from cake_core.errors import ProtocolError
from cake_core.model import DTYPE_SIZES, Batch, Buffer, Row, Tensor, Want
from cake_core.transport import MAX_HEADER
from cake_core.wire.cbor import load_map
from cake_core.wire.messages import ANSWERS as ANSWERS
from cake_core.wire.messages import CHAINED as CHAINED
from cake_core.wire.messages import SCHEMAS
from cake_core.wire.messages import Type as Type

PROTOCOL_VERSION = 1
"""Changes whenever two versions could misread each other; compared in the hello, after the proof."""

MAX_ROWS = 4096
MAX_TENSORS = 64
MAX_DIMENSIONS = 8
MAX_NAME = 64


_BATCHES = (Type.FORWARD, Type.OUTPUT)
_LISTING = (Type.CALL, Type.RESULT, Type.PIECE, Type.PROBE)
"""Messages that list their tensors in their fields."""
_PREFIX = struct.Struct("<BBHIQ")
_ROW = struct.Struct("<QIIHhHH")
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

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class Message:
    """A decoded header: `fields` of a control message, `rows` of a batch, and what the body holds.

    `stage` is the index among the stages that the worker serves for this master; `hops` is how often the output of a
    FORWARD is handed to a further worker before it goes to the master.
    """

    type: Type
    request: int
    stage: int = 0
    hops: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()
    heads: tuple[TensorHead, ...] = ()

    @property
    def body_length(self) -> int:
        return sum(head.nbytes for head in self.heads)

    def tensors(self, body: Buffer) -> dict[str, Tensor]:
        """The tensors in `body`, without copying it."""
        view, start, found = memoryview(body), 0, {}
        for head in self.heads:
            found[head.name] = Tensor(head.dtype, head.shape, view[start : start + head.nbytes])
            start += head.nbytes
        return found

    def batch(self, body: Buffer) -> Batch:
        return Batch(self.rows, self.tensors(body))


def encode(kind: Type, request: int, body: Mapping[str, Any] | None = None, stage: int = 0) -> bytes:
    """Header of a control message."""
    header = _PREFIX.pack(kind, stage, 0, request, 0) + cbor2.dumps(dict(body or {}))
    if len(header) > MAX_HEADER:
        raise ProtocolError(f"a {kind.name} message has {len(header)} bytes of header, over the limit of {MAX_HEADER}")
    return header


def encode_batch(kind: Type, request: int, batch: Batch, stage: int = 0, hops: int = 0) -> tuple[bytes, list[Buffer]]:
    """Header and buffers of a FORWARD or OUTPUT."""
    parts = [_PREFIX.pack(kind, stage, len(batch.rows), request, hops)]
    for row in batch.rows:
        want = row.want
        flags = want.score | want.hidden << 1 | row.rewind << 2
        parts.append(_ROW.pack(row.session, row.position, row.length, want.sample, want.top, want.score_top, flags))
    buffers: list[Buffer] = []
    for name, tensor in batch.tensors.items():
        parts.append(_TENSOR.pack(_NAME_CODES[name], _DTYPE_CODES[tensor.dtype], len(tensor.shape)))
        parts.append(struct.pack(f"<{len(tensor.shape)}I", *tensor.shape))
        if tensor.nbytes:
            buffers.append(tensor.data)
    header = b"".join(parts)
    if len(header) > MAX_HEADER:
        raise ProtocolError(f"a batch of {len(batch.rows)} rows does not fit a header; send fewer rows at once")
    return header, buffers


def tensor_fields(tensors: Mapping[str, Tensor]) -> tuple[list[list[Any]], list[Buffer]]:
    """How CALL and RESULT list their tensors: [name, dtype, [dimensions]], and the buffers of the body."""
    listed = [[name, tensor.dtype, list(tensor.shape)] for name, tensor in tensors.items()]
    return listed, [tensor.data for tensor in tensors.values() if tensor.nbytes]


def decode(header: bytes) -> Message:
    """Raises ProtocolError for anything that is not exactly one of our messages."""
    if not _PREFIX.size <= len(header) <= MAX_HEADER:
        raise ProtocolError(f"a header of {len(header)} bytes")
    code, stage, rows, request, hops = _PREFIX.unpack_from(header)
    try:
        kind = Type(code)
    except ValueError:
        raise ProtocolError(f"unknown message type {code}") from None
    if kind in _BATCHES:
        decoded, heads = _decode_batch(kind, header, rows)
        return Message(kind, request, stage, hops, rows=decoded, heads=heads)
    values = _decode_fields(kind, header[_PREFIX.size :])
    listed = _listed_heads(values) if kind in _LISTING else ()
    return Message(kind, request, stage, hops, values, heads=listed)


def _decode_batch(kind: Type, header: bytes, count: int) -> tuple[tuple[Row, ...], tuple[TensorHead, ...]]:
    if count > MAX_ROWS:
        raise ProtocolError(f"a batch of {count} rows, over the limit of {MAX_ROWS}")
    offset = _PREFIX.size
    try:
        rows: list[Row] = []
        heads: list[TensorHead] = []
        for _ in range(count):
            session, position, length, sample, top, score_top, flags = _ROW.unpack_from(header, offset)
            offset += _ROW.size
            if sample > length or top < -1 or flags > 7:
                raise ProtocolError("a row that wants more than it has")
            want = Want(sample, top, bool(flags & 1), score_top, bool(flags & 2))
            rows.append(Row(session, position, length, want, bool(flags & 4)))
        while offset < len(header):
            name, dtype, dimensions = _TENSOR.unpack_from(header, offset)
            offset += _TENSOR.size
            if dimensions > MAX_DIMENSIONS or len(heads) >= MAX_TENSORS:
                raise ProtocolError("too many tensors or dimensions")
            shape = struct.unpack_from(f"<{dimensions}I", header, offset)
            offset += 4 * dimensions
            heads.append(TensorHead(_NAMES[name], _DTYPES[dtype], shape))
    except (struct.error, IndexError) as error:
        raise ProtocolError(f"a damaged {kind.name} header") from error
    if len({head.name for head in heads}) < len(heads):
        raise ProtocolError("a tensor is listed twice")
    return tuple(rows), tuple(heads)


def _decode_fields(kind: Type, data: bytes) -> dict[str, Any]:
    values = load_map(data)
    for name, kinds in SCHEMAS[kind].items():
        value = values.get(name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise ProtocolError(f"{kind.name}: {name} is missing or of the wrong type")
        if isinstance(value, int) and not 0 <= value < 2**63:
            raise ProtocolError(f"{kind.name}: {name} is out of range")
    return values


def _listed_heads(values: Mapping[str, Any]) -> tuple[TensorHead, ...]:
    listed = [*values.get("constants", ()), *values["tensors"]]
    if len(listed) > MAX_TENSORS:
        raise ProtocolError(f"{len(listed)} tensors, over the limit of {MAX_TENSORS}")
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
    if len({head.name for head in heads}) < len(heads):
        raise ProtocolError("a tensor is listed twice")
    return tuple(heads)
