"""Vocabulary of a SentencePiece `tokenizer.model`, a protocol-buffers message of which four fields matter.

Read here because the sentencepiece package would be needed for nothing else.
(https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cake_core.errors import CheckpointError, UnsupportedModel
from cake_llama.build_tokenizer import NORMAL, Vocabulary

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE, _BYTE_FALLBACK, _ADD_DUMMY_PREFIX = 3, 35, 3
_BPE = 2

_Field = tuple[int, int | bytes]


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    vocabulary: Vocabulary
    prefix_space: bool
    byte_fallback: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Raises CheckpointError for a damaged file, UnsupportedModel for one that is not BPE."""
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = [_piece(value) for number, value in fields if number == _PIECES and isinstance(value, bytes)]
        trainer = _settings(fields, _TRAINER)
        normalizer = _settings(fields, _NORMALIZER)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is damaged; download it again") from error
    if not pieces:
        raise CheckpointError(f"{path} has no vocabulary; download it again")
    if trainer.get(_MODEL_TYPE, 1) != _BPE:
        raise UnsupportedModel(f"{path} is a SentencePiece model that is not BPE; Cake needs the model's tokenizer.json")
    tokens, scores, types = (list(column) for column in zip(*pieces, strict=True))
    return SentencePieceModel(
        Vocabulary(tokens, types, scores), bool(normalizer.get(_ADD_DUMMY_PREFIX, 1)), bool(trainer.get(_BYTE_FALLBACK, 0))
    )


def _settings(fields: list[_Field], number: int) -> dict[int, int | bytes]:
    """The fields of an embedded message, the last of each."""
    return {key: value for n, data in fields if n == number and isinstance(data, bytes) for key, value in _fields(data)}


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    return text, score, kind


def _fields(data: bytes) -> Iterator[_Field]:
    """Number and value of each field: integers as int, everything else as bytes. Raises ValueError on a damaged message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(data):
            raise ValueError("field beyond the end")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            raise ValueError("number beyond the end")
        value |= (data[at] & 0x7F) << shift
        at += 1
        if not data[at - 1] & 0x80:
            return value, at
    raise ValueError("number too long")
