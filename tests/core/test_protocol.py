"""Messages survive the trip; nothing that is not exactly a message is taken for one."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cake_core import errors
from cake_core.errors import ProtocolError
from cake_core.model import Batch, Row, SessionSpec, Tensor, Want, int32_tensor
from cake_core.requests import SamplingParams
from cake_core.transport import MAX_HEADER
from cake_core.wire.bodies import BodyReader
from cake_core.wire.codec import error_fields, error_from_fields, spec_from_fields, spec_to_fields
from cake_core.wire.listing import tensor_fields
from cake_core.wire.protocol import MAX_ROWS, Type, decode, encode, encode_batch

BATCH = Batch(
    (Row(1, 0, 3), Row(2**40, 7, 1, Want(1, 5, True, 3, False)), Row(3, 9, 2, Want(hidden=True))),
    {"tokens": int32_tensor([1, 2, 3, 4, 5, 6]), "hidden": Tensor("bf16", (6, 4), bytes(48))},
)


def body_of(buffers: list[Any]) -> bytes:
    return b"".join(bytes(buffer) for buffer in buffers)


def test_batch_round_trip() -> None:
    header, buffers = encode_batch(Type.FORWARD, 77, BATCH, stage=3, hops=5)
    message = decode(header)
    assert (message.type, message.request, message.stage, message.hops) == (Type.FORWARD, 77, 3, 5)
    assert message.rows == BATCH.rows
    found = message.batch(body_of(buffers))
    assert {n: (t.dtype, t.shape, bytes(t.data)) for n, t in found.tensors.items()} == {
        n: (t.dtype, t.shape, bytes(t.data)) for n, t in BATCH.tensors.items()
    }


def test_a_decode_step_is_small() -> None:
    batch = Batch((Row(1, 500, 1, Want(sample=1)),), {"hidden": Tensor("bf16", (1, 4096), bytes(8192))})
    header, buffers = encode_batch(Type.FORWARD, 1, batch)
    assert len(header) <= 64
    assert sum(memoryview(b).nbytes for b in buffers) == 8192


def test_control_round_trip() -> None:
    message = decode(encode(Type.OPEN, 9, {"session": 4, "spec": {}, "parent": None, "length": 0}, stage=2))
    assert message.fields == {"session": 4, "spec": {}, "parent": None, "length": 0}
    assert message.stage == 2


def test_spec_round_trip() -> None:
    sampling = SamplingParams(0.5, 40, 0.9, 0.05, 1.1, 128, 0.1, -0.2, ((5, -100.0),), 2**63 + 1, 3, (1, 2))
    spec = SessionSpec(sampling, 17, 2, "{}", 100, "bf16")
    assert spec_from_fields(cbor2.loads(cbor2.dumps(spec_to_fields(spec)))) == spec


@pytest.mark.parametrize("change", [{"temperature": "hot"}, {"logit_bias": [1]}, {"seed": 1.5}, {"top_k": True}])
def test_damaged_specs_are_refused(change: Mapping[str, Any]) -> None:
    fields = spec_to_fields(SessionSpec(SamplingParams()))
    fields["sampling"] = {**fields["sampling"], **change}
    with pytest.raises(ProtocolError):
        spec_from_fields(fields)
    with pytest.raises(ProtocolError):
        spec_from_fields({})


def test_errors_keep_their_kind_and_nothing_else_does() -> None:
    assert isinstance(error_from_fields(error_fields(errors.CapacityError("full"))), errors.CapacityError)
    unexpected = error_from_fields(error_fields(KeyError("x")))
    assert type(unexpected) is errors.StageError
    assert "KeyError" in str(unexpected)
    for fields in (
        {"kind": "SystemExit", "message": "no"},
        {"kind": ["NodeLost"], "message": 7},
        {"message": "no"},
        {"kind": ""},
    ):
        assert type(error_from_fields(fields)) is errors.StageError


def prefix(kind: int, rows: int = 0) -> bytes:
    return struct.pack("<BBHIQ", kind, 0, rows, 1, 0)


GOOD_OPEN = {"session": 4, "spec": {}, "parent": None, "length": 0}

BAD_HEADERS = {
    "empty": b"",
    "short": b"\x01\x00",
    "unknown type": prefix(200) + b"\xa0",
    "type 0": prefix(0) + b"\xa0",
    "no cbor": prefix(Type.OPEN),
    "not a map": prefix(Type.OPEN) + cbor2.dumps([1]),
    "missing key": prefix(Type.OPEN) + cbor2.dumps({"session": 1}),
    "wrong type": prefix(Type.OPEN) + cbor2.dumps({**GOOD_OPEN, "session": "x"}),
    "bool for int": prefix(Type.OPEN) + cbor2.dumps({**GOOD_OPEN, "session": True}),
    "negative": prefix(Type.OPEN) + cbor2.dumps({**GOOD_OPEN, "length": -1}),
    "tag": prefix(Type.OPEN) + cbor2.dumps({**GOOD_OPEN, "spec": {"a": cbor2.CBORTag(35, "a+")}}),
    "deep": prefix(Type.OPEN) + cbor2.dumps({**GOOD_OPEN, "spec": {"a": [[[[[[[[[[1]]]]]]]]]]}}),
    "indefinite": prefix(Type.ALIVE) + b"\xbf\xff",
    "trailing": prefix(Type.ALIVE) + b"\xa0\x00",
    "long string": prefix(Type.ALIVE) + b"\x7b" + (2**40).to_bytes(8, "big"),
    "long array": prefix(Type.ALIVE) + b"\x9b" + (2**60).to_bytes(8, "big"),
    "rows missing": prefix(Type.FORWARD, 2),
    "too many rows": prefix(Type.FORWARD, MAX_ROWS + 1) + bytes(100),
    "half a tensor": prefix(Type.FORWARD) + b"\x00\x01",
    "unknown name": prefix(Type.FORWARD) + struct.pack("<BBHI", 99, 1, 1, 1),
    "unknown dtype": prefix(Type.FORWARD) + struct.pack("<BBHI", 0, 99, 1, 1),
    "many dimensions": prefix(Type.FORWARD) + struct.pack("<BBH", 0, 1, 60000),
    "twice": prefix(Type.FORWARD) + struct.pack("<BBHI", 0, 1, 1, 1) * 2,
    "wants more": prefix(Type.FORWARD, 1) + struct.pack("<QIIHhHH", 1, 0, 1, 5, -1, 0, 0),
    "too long": prefix(Type.ALIVE) + b"\xa0" + bytes(MAX_HEADER),
    "call tensors": prefix(Type.CALL)
    + cbor2.dumps(
        {"layer": "unet", "method": "m", "image": 1, "scalars": {}, "tensors": [["a", "f99", [1]]], "constants": [], "ids": {}}
    ),
    "call shape": prefix(Type.RESULT) + cbor2.dumps({"tensors": [["a", "f32", [-1]]], "seconds": 0.0}),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_headers_are_refused(name: str) -> None:
    with pytest.raises(ProtocolError):
        decode(BAD_HEADERS[name])


def test_allocation_follows_the_shapes_and_the_limit() -> None:
    header, buffers = encode_batch(Type.FORWARD, 1, BATCH)
    length = len(body_of(buffers))
    reader = BodyReader(limit=1000)
    assert len(reader.allocate(header, length)) == length
    with pytest.raises(ProtocolError, match="declared"):
        reader.allocate(header, length + 1)
    with pytest.raises(ProtocolError, match="limit"):
        BodyReader(limit=10).allocate(header, length)
    with pytest.raises(ProtocolError, match="missing"):
        BodyReader(1000).message(header)


def test_giant_shapes_allocate_nothing() -> None:
    header = prefix(Type.FORWARD) + struct.pack("<BBHIIII", 1, 1, 4, *[2**32 - 1] * 4)
    with pytest.raises(ProtocolError):
        BodyReader(limit=1 << 30).allocate(header, 2**62)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_refused_or_decoded_but_never_anything_else(data: bytes) -> None:
    try:
        message = decode(data)
    except ProtocolError:
        return
    assert message.body_length >= 0


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.data())
def test_damaged_messages_are_refused_or_decoded(data: st.DataObject) -> None:
    listed, _ = tensor_fields({"x": Tensor("f32", (2, 2), bytes(16))})
    call = {"layer": "unet", "method": "m", "image": 1, "scalars": {"t": 1.5}, "tensors": listed, "constants": [], "ids": {}}
    header = bytearray(data.draw(st.sampled_from([encode_batch(Type.OUTPUT, 1, BATCH)[0], encode(Type.CALL, 1, call)])))
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(header)))
    try:
        message = decode(bytes(header[:cut]) if data.draw(st.booleans()) else bytes(header))
    except ProtocolError:
        return
    assert message.body_length >= 0
