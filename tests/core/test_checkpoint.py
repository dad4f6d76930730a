"""Folders and files of safetensors: opened by their headers, refused with a reason when damaged."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cake_core.checkpoint import SafetensorsCheckpoint, sample_bytes
from cake_core.errors import CheckpointError
from cake_core.formats.safetensors import read_header
from cake_core.testing.toy_checkpoint import write_safetensors
from cake_core.testing.toys import write_toy_checkpoint


def safetensors(path, header, data=b"\0" * 64, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_headers_are_read_with_absolute_offsets(tmp_path):
    file = safetensors(tmp_path / "m.safetensors", {"__metadata__": {"a": "b"}, "x": entry(), "y": entry("U8", (), (8, 9))})
    tensors = read_header(file)
    assert set(tensors) == {"x", "y"}
    start = file.stat().st_size - 64
    assert (tensors["x"].offset, tensors["x"].nbytes, tensors["x"].shape) == (start, 8, (2,))
    assert (tensors["y"].offset, tensors["y"].nbytes, tensors["y"].shape) == (start + 8, 1, ())


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        (b"{}", {"length": 10**12}, "truncated or not a safetensors"),
        (b"{}", {"length": 1}, "truncated or not a safetensors"),
        (b"not json", {}, "damaged header"),
        (b"[1, 2]", {}, "damaged header"),
        (b"[" * 100_000, {}, "damaged header"),
        (b"\xff\xfe", {}, "damaged header"),
        ({"x": 7}, {}, "damaged or unknown description"),
        ({"x": entry("F33")}, {}, "damaged or unknown description"),
        ({"x": {"dtype": "F32", "shape": [2]}}, {}, "damaged or unknown description"),
        ({"x": entry(offsets=(0,))}, {}, "damaged or unknown description"),
        ({"x": entry(offsets=(0, 9))}, {}, "disagree"),
        ({"x": entry(offsets=(8, 0))}, {}, "disagree"),
        ({"x": entry(shape=(-2,), offsets=(8, 0))}, {}, "disagree"),
        ({"x": entry(shape=(2.0,))}, {}, "disagree"),
        ({"x": entry(offsets=(60, 68))}, {}, "truncated: it ends before tensor 'x'"),
    ],
)
def test_damaged_files_are_named(tmp_path, header, options, message):
    file = safetensors(tmp_path / "m.safetensors", header, **options)
    with pytest.raises(CheckpointError, match=message) as info:
        read_header(file)
    assert str(file) in str(info.value)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_header_or_a_checkpoint_error(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    file.write_bytes(struct.pack("<Q", len(data)) + data if len(data) % 2 else data)
    try:
        tensors = read_header(file)
    except CheckpointError:
        return
    assert all(tensor.offset + tensor.nbytes <= file.stat().st_size for tensor in tensors.values())


def test_every_truncation_of_a_file_is_noticed(tmp_path):
    whole = write_toy_checkpoint(tmp_path / "toy").tensors["lm_head.bias"].file
    data, cut = whole.read_bytes(), tmp_path / "cut.safetensors"
    for length in (*range(64), *range(64, len(data), 97), len(data) - 1):
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read_header(cut)


def test_shards_by_index_and_by_name(tmp_path):
    for index in (1, 2):
        write_safetensors(tmp_path / f"part{index}.safetensors", {f"t{index}": ("U8", (3,), b"abc")})
    assert set(SafetensorsCheckpoint(tmp_path).tensors) == {"t1", "t2"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t2": "part2.safetensors"}}))
    assert set(SafetensorsCheckpoint(tmp_path).tensors) == {"t2"}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "does not hold a JSON object"),
        ({}, "no usable weight_map"),
        ({"weight_map": {"t": 7}}, "no usable weight_map"),
        ({"weight_map": {"t": "../x.safetensors"}}, "cannot be a file beside it"),
        ({"weight_map": {"t": "/etc/passwd"}}, "cannot be a file beside it"),
        ({"weight_map": {"t": "missing.safetensors"}}, "lacks missing.safetensors"),
    ],
)
def test_bad_indexes_are_named(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        _ = SafetensorsCheckpoint(tmp_path).tensors


def test_folders_that_are_no_checkpoint(tmp_path):
    checkpoint = SafetensorsCheckpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        _ = checkpoint.config
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        _ = checkpoint.tensors
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        _ = SafetensorsCheckpoint(tmp_path).config


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for name in ("a", "b"):
        write_safetensors(tmp_path / f"{name}.safetensors", {"t": ("U8", (1,), b"x")})
    with pytest.raises(CheckpointError, match=r"t is in a\.safetensors and in b\.safetensors"):
        _ = SafetensorsCheckpoint(tmp_path).tensors


def test_fingerprints_tell_fine_tunes_apart_and_ignore_files(tmp_path):
    one, other = write_toy_checkpoint(tmp_path / "one"), write_toy_checkpoint(tmp_path / "other", seed=1)
    names = sorted(one.tensors)
    assert one.fingerprint(names) != other.fingerprint(names)
    assert one.fingerprint(names[:2]) != one.fingerprint(names[:3])
    assert one.fingerprint(names) == one.fingerprint(reversed(names))
    for name in names:
        tensor = one.tensors[name]
        data = tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        (tmp_path / "split").mkdir(exist_ok=True)
        write_safetensors(tmp_path / "split" / f"{name}.safetensors", {name: (tensor.dtype, tensor.shape, data)})
    assert SafetensorsCheckpoint(tmp_path / "split").fingerprint(names) == one.fingerprint(names)


def test_samples_reach_both_ends_of_a_large_tensor(tmp_path):
    data = bytearray(100_000)
    file = tmp_path / "m.safetensors"

    def sampled():
        write_safetensors(file, {"t": ("U8", (len(data),), bytes(data))})
        return sample_bytes(read_header(file)["t"])

    before = sampled()
    assert len(before) < 5000
    for place in (0, len(data) - 8):
        data[place] ^= 1
        assert sampled() != before
        data[place] ^= 1


def test_a_file_that_is_gone_is_named(tmp_path):
    checkpoint = write_toy_checkpoint(tmp_path)
    tensor = checkpoint.tensors["lm_head.bias"]
    tensor.file.unlink()
    with pytest.raises(CheckpointError, match="check that the file is still there"):
        checkpoint.fingerprint(["lm_head.bias"])
    with pytest.raises(CheckpointError, match="cannot read"):
        read_header(tensor.file)
