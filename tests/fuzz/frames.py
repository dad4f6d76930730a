"""Bytes that are nearly right: frames of the handshake, of the stream framing and of the protocol, with something wrong.

Structure-aware: a valid message is made first and then damaged, because bytes at random never get past a magic number.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import cbor2
from tests.fuzz import plausible

from cake_core.framing import MAGIC as STREAM_MAGIC
from cake_core.model import Batch, Row, Tensor, Want
from cake_core.security.handshake import MAGIC as HANDSHAKE_MAGIC
from cake_core.security.handshake import NONCE
from cake_core.wire.protocol import Type, encode, encode_batch

_EDGES = (0, 1, 2, 7, 8, 63, 64, 127, 128, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_CBOR_HEADS = bytes(major << 5 | info for major in range(8) for info in (0, 23, 24, 25, 26, 27, 28, 31))


def handshake_frame(rng: random.Random) -> bytes:
    kind = rng.choice((1, 2, 3, 4, rng.randrange(256)))
    if kind in (1, 2):
        payload = bytes([rng.choice((0, 1, 1, 2))]) + rng.randbytes(NONCE) + rng.randbytes(rng.choice((0, 5, 4096, 4097)))
    else:
        payload = rng.randbytes(rng.choice((32, 32, 31, 33, 0)))
    return damaged(HANDSHAKE_MAGIC + bytes([kind]) + payload, rng)


def stream_bytes(rng: random.Random) -> bytes:
    parts = []
    for _ in range(rng.randrange(1, 4)):
        header, body = rng.randbytes(rng.choice((1, 16, 300))), rng.randbytes(rng.choice((0, 1, 100, 5000)))
        sizes = [len(header), len(body)]
        if rng.random() < 0.3:
            sizes[rng.randrange(2)] = rng.choice(_EDGES) & (2**32 - 1)
        parts.append(STREAM_MAGIC + struct.pack("!IQ", *sizes) + header + body)
    return damaged(b"".join(parts), rng)


def protocol_header(rng: random.Random) -> bytes:
    return damaged(rng.choice(_MAKERS)(rng), rng)


def _control(rng: random.Random) -> bytes:
    """A message as its sender would make it; in two of three cases with some of its fields damaged or left out."""
    kind = rng.choice(tuple(plausible.FIELDS))
    return control(kind, rng)


def control(kind: Type, rng: random.Random) -> bytes:
    fields = plausible.FIELDS[kind](rng)
    for name in rng.sample(sorted(fields), min(len(fields), rng.choice((0, 1, 2)))):
        fields[name] = _damaged_value(fields[name], rng)
    if fields and rng.random() < 0.1:
        del fields[rng.choice(sorted(fields))]
    if rng.random() < 0.1:
        fields["of a later version"] = _value(rng, 3)
    return encode(kind, rng.choice(_EDGES) & 0xFFFFFFFF, fields, rng.choice((0, 0, 1, 255)))


def _damaged_value(value: object, rng: random.Random) -> object:
    """Of another type, or, deeper inside, the same with one thing wrong: what is checked first must not hide what is not."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = rng.choice(sorted(value))
        if rng.random() < 0.2:
            return {key: kept for key, kept in value.items() if key != name}
        return {**value, name: _damaged_value(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], *[_damaged_value(value[place], rng)] * rng.choice((0, 1, 1, 2)), *value[place + 1 :]]
    return rng.choice(_EDGES) if type(value) is int and rng.random() < 0.5 else _value(rng, 3)


def _batch(rng: random.Random) -> bytes:
    rows = tuple(
        Row(rng.choice(_EDGES), rng.randrange(2**16), n, Want(min(n, 1), rng.choice((-1, 0, 5)), False, 0, False))
        for n in (1, rng.randrange(1, 9))
    )
    shape = (sum(row.length for row in rows), rng.choice((1, 8)))
    hidden = Tensor("f32", shape, bytes(4 * shape[0] * shape[1]))
    kind = rng.choice((Type.FORWARD, Type.OUTPUT))
    return encode_batch(kind, rng.randrange(2**32), Batch(rows, {"hidden": hidden}), rng.randrange(256))[0]


def _wild(rng: random.Random) -> bytes:
    prefix = struct.pack("<BBHIQ", rng.choice((*Type, 0, 17, 255)), rng.randrange(256), rng.choice(_EDGES) & 0xFFFF, 1, 2)
    return prefix + bytes(rng.choice(_CBOR_HEADS) for _ in range(rng.randrange(40)))


_MAKERS: tuple[Callable[[random.Random], bytes], ...] = (_control, _batch, _wild)


def _value(rng: random.Random, depth: int) -> object:
    simple: list[object] = [
        rng.choice(_EDGES), -1, 1.5, True, None, "x" * rng.randrange(80), rng.randbytes(rng.randrange(40)),
        ["hidden", "f32", [rng.choice(_EDGES), 2]], cbor2.CBORTag(rng.randrange(300), "x"),
    ]  # fmt: skip
    if depth and rng.random() < 0.5:
        nested = _value(rng, depth - 1)
        return rng.choice(([nested] * rng.randrange(4), {"a": nested}, [["hidden", "f32", [1, 2]], nested]))
    return rng.choice(simple)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """As it is in one of three cases; else cut, lengthened, repeated, or with bytes changed."""
    how = rng.randrange(9)
    at = rng.randrange(len(data) + 1)
    if how < 3:
        return data
    if how == 3:
        return data[:at]
    if how == 4:
        return data + rng.randbytes(rng.randrange(1, 20))
    if how == 5:
        return data[:at] + data[at // 2 :]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if changed:
            place = rng.randrange(min(len(changed), 64) if rng.random() < 0.7 else len(changed))
            changed[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, changed[place] ^ 1 << rng.randrange(8)))
    return bytes(changed)
