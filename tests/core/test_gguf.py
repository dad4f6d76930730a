"""The GGUF reader: what it reads, what it refuses, and that no damage gets past it as anything but a CheckpointError."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cake_core.errors import CheckpointError, UnsupportedModel
from cake_core.formats.gguf import GgufCheckpoint
from cake_core.formats.gguf_header import TYPES, GgufArray, read_gguf
from cake_core.testing.toy_gguf import write_toy_gguf

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.rope.freq_base": 10000.0,
    "negative": -5,
    "large": 1 << 40,
    "flag": True,
    "tokenizer.ggml.tokens": ["<s>", "▁a", "é", ""],
    "tokenizer.ggml.token_type": [3, 1, 1, 1],
    "tokenizer.ggml.scores": [0.0, -1.5, -2.0, 0.5],
}
TENSORS = {
    "token_embd.weight": ("F32", (4, 8), bytes(range(128))),
    "blk.0.attn_q.weight": ("Q4_K", (2, 256), bytes(288)),
    "output_norm.weight": ("F16", (8,), bytes(16)),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_toy_gguf(tmp_path / "model.gguf", METADATA, TENSORS)


def test_metadata_of_every_kind(path: Path) -> None:
    config = GgufCheckpoint(path).config
    assert {key: list(v) if isinstance(v, GgufArray) else v for key, v in config.items()} == METADATA


@pytest.mark.parametrize("version", [2, 3])
def test_tensors_have_outermost_dimension_first_and_their_bytes(tmp_path: Path, version: int) -> None:
    checkpoint = GgufCheckpoint(write_toy_gguf(tmp_path / "m.gguf", METADATA, TENSORS, version))
    assert checkpoint.format == "gguf"
    for name, (dtype, shape, data) in TENSORS.items():
        tensor = checkpoint.tensors[name]
        assert (tensor.dtype, tensor.shape, tensor.nbytes) == (dtype, shape, len(data))
        assert tensor.offset % 32 == 0
        assert tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes] == data


def test_another_alignment(tmp_path: Path) -> None:
    path = write_toy_gguf(tmp_path / "m.gguf", {**METADATA, "general.alignment": 256}, TENSORS)
    assert all(tensor.offset % 256 == 0 for tensor in GgufCheckpoint(path).tensors.values())


def test_arrays_are_read_when_looked_at(path: Path) -> None:
    tokens = read_gguf(path).metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == 4
    path.rename(path.with_suffix(".moved"))
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.gguf"):
        _ = tokens[0]
    path.with_suffix(".moved").rename(path)
    assert (tokens[1], tokens[-2], tokens[1:3]) == ("▁a", "é", ["▁a", "é"])


def test_a_config_beside_a_gguf_file_is_not_its_own(path: Path) -> None:
    (path.parent / "generation_config.json").write_text("{}")
    assert GgufCheckpoint(path).json("generation_config.json") is None


@pytest.mark.parametrize("named", [1, 2, 3])
def test_parts_are_one_model_whichever_is_named(tmp_path: Path, named: int) -> None:
    for number, (name, tensor) in enumerate(TENSORS.items()):
        metadata = {**(METADATA if number == 0 else {}), "split.no": number, "split.count": 3, "split.tensors.count": 3}
        write_toy_gguf(tmp_path / f"big-{number + 1:05d}-of-00003.gguf", metadata, {name: tensor})
    checkpoint = GgufCheckpoint(tmp_path / f"big-{named:05d}-of-00003.gguf")
    assert checkpoint.name == "big"
    assert checkpoint.config["general.architecture"] == "llama"
    assert set(checkpoint.tensors) == set(TENSORS)
    (tmp_path / "big-00002-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"lacks big-00002-of-00003\.gguf"):
        _ = GgufCheckpoint(checkpoint.path).config


def test_parts_of_two_models_are_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        write_toy_gguf(tmp_path / f"m-0000{number}-of-00002.gguf", {**METADATA, "split.tensors.count": 5}, TENSORS)
    with pytest.raises(CheckpointError, match=r"tensor token_embd\.weight is in"):
        _ = GgufCheckpoint(tmp_path / "m-00001-of-00002.gguf").tensors


def rewrite(path: Path, at: int, form: str, value: int) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, at, value)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("at", "form", "value", "error", "message"),
    [
        (0, "<I", 0x46554748, CheckpointError, "not a GGUF file"),
        (4, "<I", 1, UnsupportedModel, "GGUF version 1"),
        (4, ">I", 3, UnsupportedModel, "big-endian"),
        (8, "<Q", 1 << 60, CheckpointError, "truncated or damaged"),
        (16, "<Q", 1 << 60, CheckpointError, "truncated or damaged"),
        (24, "<Q", 1 << 62, CheckpointError, "truncated or damaged"),
        (24 + 8 + 20, "<I", 99, CheckpointError, "unknown type 99"),
    ],
)
def test_a_damaged_header_says_what_is_wrong(
    path: Path, at: int, form: str, value: int, error: type[CheckpointError], message: str
) -> None:
    rewrite(path, at, form, value)
    with pytest.raises(error, match=message):
        read_gguf(path)


def tensor_entry(path: Path, name: str) -> int:
    """Where the description of a tensor goes on after its name."""
    return path.read_bytes().index(name.encode()) + len(name)


@pytest.mark.parametrize(
    ("at", "form", "value", "error", "message"),
    [
        (0, "<I", 9, CheckpointError, "9 dimensions"),
        (4, "<Q", 255, CheckpointError, "whole Q4_K blocks"),
        (4, "<Q", 1 << 40, CheckpointError, "ends before tensor"),
        (20, "<I", 77, UnsupportedModel, "GGUF type 77"),
        (24, "<Q", 1, CheckpointError, "not aligned"),
        (24, "<Q", 1 << 50, CheckpointError, "ends before tensor"),
    ],
)
def test_a_damaged_tensor_is_named(
    path: Path, at: int, form: str, value: int, error: type[CheckpointError], message: str
) -> None:
    rewrite(path, tensor_entry(path, "blk.0.attn_q.weight") + at, form, value)
    with pytest.raises(error, match=message) as raised:
        read_gguf(path)
    assert "blk.0.attn_q.weight" in str(raised.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        read_gguf(tmp_path / "none.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(CheckpointError, match="download it again"):
        read_gguf(tmp_path / "empty.gguf")


def test_a_key_or_a_tensor_twice(tmp_path: Path) -> None:
    path = write_toy_gguf(tmp_path / "m.gguf", {"aa": 1, "bb": 2}, {"x": ("F32", (1,), bytes(4)), "y": ("F32", (1,), bytes(4))})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"bb", b"aa"))
    with pytest.raises(CheckpointError, match="metadata 'aa' twice"):
        read_gguf(path)
    path.write_bytes(whole.replace(struct.pack("<Q", 1) + b"y", struct.pack("<Q", 1) + b"x"))
    with pytest.raises(CheckpointError, match="tensor 'x' twice"):
        read_gguf(path)


def test_every_truncation_is_an_error(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        if length >= len(whole) - 16:  # the last tensor's padding
            continue
        with pytest.raises(CheckpointError):
            read_gguf(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), min_size=1, max_size=6))
def test_random_damage_never_escapes_as_anything_else(path: Path, changes: list[tuple[int, int]]) -> None:
    pristine = write_toy_gguf(path, METADATA, TENSORS).read_bytes()
    data = bytearray(pristine)
    for at, value in changes:
        data[at % len(data)] = value
    path.write_bytes(data)
    message = path.name
    try:
        checkpoint = GgufCheckpoint(path)
        for value in checkpoint.config.values():
            if isinstance(value, GgufArray):
                list(value)
        assert all(tensor.offset + tensor.nbytes <= len(data) for tensor in checkpoint.tensors.values())
    except CheckpointError as error:
        message = str(error)
    assert path.name in message


def test_a_type_table_without_holes() -> None:
    served = {
        "F32",
        "F16",
        "BF16",
        "Q8_0",
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "IQ4_NL",
        "IQ4_XS",
        *(f"Q{n}_K" for n in range(2, 7)),
    }
    assert served <= {name for name, _, _ in TYPES.values()}
