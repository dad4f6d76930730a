"""Checkpoints of the toy models: written to a folder, or the ones that come with this package."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cake_core.checkpoint import Checkpoint, SafetensorsCheckpoint
from cake_core.errors import CheckpointError

TEXT_TYPE = "cake-toy"
IMAGE_TYPE = "cake-toy-image"

PRIME = 251
"""Toy hidden states are whole numbers below this: exact in every float dtype that may cross the wire, bf16 included."""
LOGIT_PRIME = 65521

HIDDEN = 8
BYTES = 256
SPECIALS = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
VOCABULARY = BYTES + len(SPECIALS)
BEGIN, END, SYSTEM, USER, ASSISTANT, TOOL = range(BYTES, VOCABULARY)

_LETTERS = frozenset(b"abcdefghijklmnopqrstuvwxyz,.")

_Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]


def toy_checkpoint(name: str = "toy") -> Checkpoint:
    """The toy of this name that comes with the package, the same on every machine: `toy` (text) or `toy-image`."""
    return SafetensorsCheckpoint(Path(__file__).parent / "data" / name, name)


def toy_image_checkpoint() -> Checkpoint:
    """The image toy that comes with the package."""
    return toy_checkpoint("toy-image")


def write_toy_checkpoint(folder: Path, layers: int = 4, seed: int = 0, **config: Any) -> Checkpoint:
    """Writes a text toy to `folder` (made if missing) and opens it.

    Args:
        seed: another seed makes another model of the same shape, as a fine-tune would be.
        config: further keys of config.json, e.g. `recurrent=True` or `context_length=128`; see `toy_text`.
    """
    tensors = {"model.embed_tokens.weight": _numbers(seed, "embed", VOCABULARY, HIDDEN)}
    for index in range(layers):
        tensors[f"model.layers.{index}.weight"] = _numbers(seed, f"layer {index}", 4, HIDDEN)
    tensors["model.norm.weight"] = _numbers(seed, "norm", 2, HIDDEN)
    words = array("H", (1 + n % (LOGIT_PRIME - 1) for (n,) in struct.iter_unpack("<H", _stream(seed, "head", VOCABULARY * 4))))
    tensors["lm_head.weight"] = ("U16", (VOCABULARY, 2), words.tobytes())
    tensors["lm_head.bias"] = ("F32", (VOCABULARY,), array("f", map(_bias, range(VOCABULARY))).tobytes())
    settings = {"model_type": TEXT_TYPE, "architectures": ["ToyForCausalLM"], "num_hidden_layers": layers}
    return _write(folder, {**settings, "context_length": 4096, **config}, tensors)


def write_toy_image_checkpoint(folder: Path, seed: int = 0, **config: Any) -> Checkpoint:
    """Writes an image toy to `folder` (made if missing) and opens it."""
    tensors = {f"{name}.weight": _numbers(seed, name, rows, HIDDEN) for name, rows in (("clip", 2), ("unet", 8), ("vae", 3))}
    settings = {"model_type": IMAGE_TYPE, "architectures": ["ToyImagePipeline"]}
    return _write(folder, {**settings, **config}, tensors)


def _bias(token: int) -> float:
    """Makes letters and spaces likely, other bytes rare, the end an occasional visitor and the other specials no guests."""
    if token == ord(" "):
        return 2.0
    if token < BYTES:
        return 0.0 if token in _LETTERS else -6.0
    return -0.75 if token == END else -20.0


def _numbers(seed: int, name: str, rows: int, columns: int) -> tuple[str, tuple[int, ...], bytes]:
    """Whole numbers 1 .. PRIME - 1: never 0, so that nothing a weight multiplies is lost."""
    return "U8", (rows, columns), bytes(1 + n % (PRIME - 1) for n in _stream(seed, name, rows * columns))


def _stream(seed: int, name: str, length: int) -> bytes:
    return hashlib.shake_128(f"{seed}/{name}".encode()).digest(length)


def _write(folder: Path, config: Mapping[str, Any], tensors: _Tensors) -> Checkpoint:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    write_safetensors(folder / "model.safetensors", tensors)
    return SafetensorsCheckpoint(folder)


def write_safetensors(file: Path, tensors: _Tensors) -> None:
    """Writes (dtype, shape, bytes) by name in the safetensors format."""
    header, offset = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def check_shapes(checkpoint: Checkpoint, expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raises CheckpointError unless the checkpoint has every tensor of `expected` with its (dtype, shape)."""
    for name, (dtype, shape) in expected.items():
        tensor = checkpoint.headers.get(name)
        if tensor is None:
            raise CheckpointError(f"{checkpoint.path} lacks tensor {name}; write the toy again with write_toy_checkpoint")
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise CheckpointError(
                f"{checkpoint.path}: {name} is {tensor.dtype}{list(tensor.shape)}, not {dtype}{list(shape)}; "
                "write the toy again with write_toy_checkpoint"
            )


def read_tensor(checkpoint: Checkpoint, name: str) -> list[Sequence[float]]:
    """A tensor's values as rows; one row for a vector."""
    tensor = checkpoint.tensors[name]
    data = bytearray(tensor.nbytes)
    checkpoint.read_into(tensor, 0, memoryview(data))
    values: Sequence[float] = array({"U8": "B", "U16": "H", "F32": "f"}[tensor.dtype], data).tolist()
    width = tensor.shape[-1]
    return [values[start : start + width] for start in range(0, math.prod(tensor.shape), width)]
