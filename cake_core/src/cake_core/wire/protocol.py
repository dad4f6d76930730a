"""The messages between master and worker, as bytes. Pure: no socket, no clock, no thread.

A message is a header and a body (`transport.Channel` moves both). The header is a fixed 16-byte prefix and then, for
control messages, a small CBOR map without tags, or, for batches, fixed binary rows: a decode step costs no CBOR. The body
is the raw bytes of the tensors the header lists, one after another. Everything is little-endian.

    prefix   type u8 | stage u8 | rows u16 | request u32 | hops u64
    row      session u64 | position u32 | length u32 | sample u16 | top i16 | score_top u16 | flags u16
    flags    1 score | 2 hidden | 4 rewind

and what `wire.listing` says of the body.

Nothing is allocated before the declared sizes have been checked against one another and against the limits.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import cbor2

from cake_core.errors import ProtocolError
from cake_core.model import Batch, Buffer, Row, Tensor, Want
from cake_core.transport import MAX_HEADER
from cake_core.wire.cbor import load_map
from cake_core.wire.listing import NO_TENSORS, Listing, read_fields, read_listing, write_listing
from cake_core.wire.messages import ANSWERS as ANSWERS
from cake_core.wire.messages import CHAINED as CHAINED
from cake_core.wire.messages import SCHEMAS
from cake_core.wire.messages import Type as Type

PROTOCOL_VERSION = 1
"""Changes whenever two versions could misread each other; compared in the hello, after the proof."""

MAX_ROWS = 4096

_TYPES = {int(kind): kind for kind in Type}
_LISTING = (Type.CALL, Type.RESULT, Type.PIECE, Type.PROBE)
"""Messages that list their tensors in their fields."""
_PREFIX = struct.Struct("<BBHIQ")
_ROW = struct.Struct("<QIIHhHH")
_SCORE, _HIDDEN, _REWIND = 1, 2, 4
_NO_FIELDS: Mapping[str, Any] = MappingProxyType({})


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
    listing: Listing = NO_TENSORS

    @property
    def body_length(self) -> int:
        return self.listing.nbytes

    def tensors(self, body: Buffer) -> dict[str, Tensor]:
        """The tensors in `body`, without copying it."""
        return self.listing.tensors(body)

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
        flags = want.score * _SCORE | want.hidden * _HIDDEN | row.rewind * _REWIND
        parts.append(_ROW.pack(row.session, row.position, row.length, want.sample, want.top, want.score_top, flags))
    parts.append(write_listing(batch.tensors))
    header = b"".join(parts)
    if len(header) > MAX_HEADER:
        raise ProtocolError(f"a batch of {len(batch.rows)} rows does not fit a header; send fewer rows at once")
    return header, [tensor.data for tensor in batch.tensors.values() if tensor.nbytes]


def decode(header: bytes) -> Message:
    """Raises ProtocolError for anything that is not exactly one of our messages."""
    if not _PREFIX.size <= len(header) <= MAX_HEADER:
        raise ProtocolError(f"a header of {len(header)} bytes")
    code, stage, rows, request, hops = _PREFIX.unpack_from(header)
    kind = _TYPES.get(code)
    if kind is None:
        raise ProtocolError(f"unknown message type {code}")
    if kind is Type.FORWARD or kind is Type.OUTPUT:
        return Message(kind, request, stage, hops, _NO_FIELDS, *_decode_batch(kind, header, rows))
    values = _decode_fields(kind, header[_PREFIX.size :])
    listed = (values["constants"] if kind is Type.CALL else []) + values["tensors"] if kind in _LISTING else []
    return Message(kind, request, stage, hops, values, listing=read_fields(listed))


def _decode_batch(kind: Type, header: bytes, count: int) -> tuple[tuple[Row, ...], Listing]:
    if count > MAX_ROWS:
        raise ProtocolError(f"a batch of {count} rows, over the limit of {MAX_ROWS}")
    end = _PREFIX.size + count * _ROW.size
    if len(header) < end:
        raise ProtocolError(f"a damaged {kind.name} header")
    rows = []
    for session, position, length, sample, top, score_top, flags in _ROW.iter_unpack(header[_PREFIX.size : end]):
        if sample > length:
            raise ProtocolError("a row that wants more than it has")
        rows.append(Row(session, position, length, _want(sample, top, score_top, flags & ~_REWIND), bool(flags & _REWIND)))
    return tuple(rows), read_listing(header[end:])


@lru_cache(256)
def _want(sample: int, top: int, score_top: int, flags: int) -> Want:
    """One object for all rows that want the same, as nearly all do."""
    if top < -1 or flags & ~(_SCORE | _HIDDEN):
        raise ProtocolError("a row that wants what there is not")
    return Want(sample, top, bool(flags & _SCORE), score_top, bool(flags & _HIDDEN))


def _decode_fields(kind: Type, data: bytes) -> dict[str, Any]:
    values = load_map(data)
    for name, kinds in SCHEMAS[kind].items():
        value = values.get(name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise ProtocolError(f"{kind.name}: {name} is missing or of the wrong type")
        if isinstance(value, int) and not 0 <= value < 2**63:
            raise ProtocolError(f"{kind.name}: {name} is out of range")
    return values
