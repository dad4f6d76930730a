"""Values that cross nodes: tensors, batches, pending results."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cake_core.errors import ConfigError, DeadlineExceeded, ProtocolError, StageError
from cake_core.model import (
    DTYPE_SIZES,
    Batch,
    LoadOptions,
    Pending,
    Row,
    Tensor,
    float32_values,
    int32_tensor,
    int32_values,
)


@pytest.mark.parametrize(
    ("dtype", "shape", "data", "message"),
    [
        ("f33", (1,), b"1234", "unknown dtype 'f33'"),
        ("f32", (2,), b"1234", "needs 8 bytes, not 4"),
        ("f32", (-1, -1), b"1234", "negative dimension"),
        ("bf16", (2, 2), b"1234567", "needs 8 bytes, not 7"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(dtype, shape, data, message):
    with pytest.raises(ProtocolError, match=message):
        Tensor(dtype, shape, data)


def test_tensors_take_any_buffer():
    for data in (b"12345678", bytearray(8), memoryview(bytearray(8)).cast("f")):
        assert Tensor("f32", (2,), data).nbytes == 8
    assert Tensor("f32", (), b"1234").nbytes == 4
    assert Tensor("i8", (0, 7), b"").nbytes == 0


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_int32_goes_there_and_back(values):
    assert int32_values(int32_tensor(values)) == values


def test_values_of_another_dtype_are_refused():
    with pytest.raises(ProtocolError, match="expected i32"):
        int32_values(Tensor("f32", (1,), b"1234"))
    with pytest.raises(ProtocolError, match="expected f32"):
        float32_values(Tensor("i32", (1,), b"1234"))


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=6),
    st.sampled_from(sorted(DTYPE_SIZES)),
    st.integers(1, 3),
)
def test_split_and_join_are_inverse(lengths, dtype, width):
    rows = tuple(Row(session, 0, length) for session, length in enumerate(lengths))
    total = sum(lengths)
    size = total * width * DTYPE_SIZES[dtype]
    hidden = Tensor(dtype, (total, width), bytes(index % 256 for index in range(size)))
    batch = Batch(rows, {"hidden": hidden, "tokens": int32_tensor(range(total))})
    parts = list(batch.split())
    assert [part.positions for part in parts] == lengths
    joined = Batch.join(parts)
    assert joined.rows == rows
    assert bytes(joined.tensors["hidden"].data) == bytes(hidden.data)
    assert int32_values(joined.tensors["tokens"]) == list(range(total))


def test_tensors_of_different_kinds_cannot_be_joined():
    batches = [Batch((), {"hidden": Tensor("f32", (1, width), bytes(4 * width))}) for width in (1, 2)]
    with pytest.raises(ProtocolError, match="cannot join"):
        Batch.join(batches)


@pytest.mark.parametrize("options", [{"dtype": "f64"}, {"threads": 0}, {"context": 0}, {"kv_tokens": -1}])
def test_load_options_are_checked(options):
    with pytest.raises(ConfigError, match=next(iter(options)).replace("_", ".")):
        LoadOptions(**options)


class TestPending:
    def test_result_waits_for_another_thread(self):
        pending, value = Pending(), Batch((), {})
        timer = threading.Timer(0.05, pending.set, (value,))
        timer.start()
        assert pending.result(5) is value
        timer.join()

    def test_result_has_a_deadline_and_comes_later_all_the_same(self):
        pending = Pending()
        with pytest.raises(DeadlineExceeded):
            pending.result(0.01)
        assert not pending.done()
        pending.set(Batch((), {}))
        assert pending.done()
        assert pending.result() == Batch((), {})

    def test_the_first_completion_counts(self):
        pending = Pending()
        pending.fail(StageError("first"))
        pending.set(Batch((), {}))
        with pytest.raises(StageError, match="first"):
            pending.result()

    def test_callbacks_run_once_also_late_ones(self):
        pending, seen = Pending(), []
        pending.when_done(seen.append)
        pending.set(Batch((), {}))
        pending.set(Batch((), {}))
        pending.when_done(seen.append)
        assert seen == [pending, pending]
