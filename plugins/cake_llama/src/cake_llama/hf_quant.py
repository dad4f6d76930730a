"""Quantised Hugging Face checkpoints: of which tensors a matrix is made, and what they mean. No torch.

Which matrices are quantised is told by the tensors that are there, not by the lists of exceptions in `quantization_config`:
those are patterns over module names, and every method writes its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cake_core.checkpoint import Checkpoint, TensorInfo
from cake_core.errors import CheckpointError, UnsupportedModel

Shape = tuple[int, ...]

METHODS = ("gptq (4 and 8 bit)", "awq (4 bit, gemm)", "fp8 (e4m3)", "compressed-tensors (int4, int8, fp8)")
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_PLAIN = ("F32", "F16", "BF16", "F64")
UNIT = 32
"""A group of columns is a multiple of it."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """What `quantization_config` says of all matrices."""

    method: str
    group: int = -1
    """Columns a group, -1: a whole row."""
    block: tuple[int, int] | None = None
    """FP8: rows and columns that share a scale; None: as the scales' shape says."""
    zero_offset: int = 0
    """Added to the zeros of the file: the first GPTQ format stores them less one."""
    activations: bool = False
    """Whether activations were meant to be narrowed too."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One weight as it lies in a checkpoint: its tensors by role."""

    name: str
    shape: Shape
    parts: Mapping[str, TensorInfo]
    form: str = "plain"
    """`plain`, `gptq`, `awq`, `packed`, `int8` or `fp8`."""
    bits: int = 0
    group: int = 0
    block: tuple[int, int] = (0, 0)
    zero_offset: int = 0

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


def scheme_of(checkpoint: Checkpoint) -> Scheme | None:
    """None for a checkpoint that is not quantised. Raises UnsupportedModel for a method that is not served."""
    found = checkpoint.config.get("quantization_config") if checkpoint.format == "safetensors" else None
    if not found:
        return None
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{checkpoint.path}: quantization_config is not a map; download config.json again")
    return _Reader(checkpoint.path, found).scheme()


@dataclass(frozen=True, slots=True)
class _Reader:
    path: Path
    values: Mapping[str, Any]

    def scheme(self) -> Scheme:
        match str(self.values.get("quant_method", "")).lower():
            case "gptq":
                return self._gptq()
            case "awq":
                return self._awq()
            case "fp8":
                block = self.values.get("weight_block_size")
                return Scheme("fp8", block=(int(block[0]), int(block[1])) if block else None, activations=True)
            case "compressed-tensors":
                return self._compressed()
            case method:
                raise self._refusal(f"by {method or 'an unnamed method'!r}")

    def _gptq(self) -> Scheme:
        bits = self.values.get("bits")
        if bits not in (4, 8):
            raise self._refusal(f"by gptq in {bits} bit")
        layout = self.values.get("checkpoint_format") or "gptq"
        if layout not in ("gptq", "gptq_v2"):
            raise self._refusal(f"by gptq and laid out as {layout}")
        return Scheme("gptq", int(self.values.get("group_size") or -1), zero_offset=1 if layout == "gptq" else 0)

    def _awq(self) -> Scheme:
        bits, version = self.values.get("bits", self.values.get("w_bit")), str(self.values.get("version", "gemm")).lower()
        if bits != 4 or version != "gemm":
            raise self._refusal(f"by awq in {bits} bit as {version}")
        return Scheme("awq", int(self.values.get("group_size") or self.values.get("q_group_size") or -1))

    def _compressed(self) -> Scheme:
        sparse = self.values.get("sparsity_config") or {}
        if sparse.get("format", "dense") != "dense":
            raise self._refusal(f"sparsely, as {sparse['format']}")
        groups = list((self.values.get("config_groups") or {}).values())
        formats = {str(group.get("format") or self.values.get("format")) for group in groups}
        if unknown := sorted(formats - {*_FORMATS, "dense"}):
            raise self._refusal(f"by compressed-tensors as {unknown[0]}")
        weights = [group.get("weights") or {} for group in groups]
        for wanted in weights:
            if (wanted.get("type"), wanted.get("num_bits")) not in (("int", 4), ("int", 8), ("float", 8)):
                raise self._refusal(f"by compressed-tensors as {wanted.get('type')} of {wanted.get('num_bits')} bit")
        block = next((wanted["block_structure"] for wanted in weights if wanted.get("block_structure")), None)
        size = (int(block[0]), int(block[1])) if isinstance(block, list) else None
        return Scheme("compressed-tensors", block=size, activations=any(group.get("input_activations") for group in groups))

    def _refusal(self, how: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.path} is quantised {how}; served are {', '.join(METHODS)}: use one of these")


@dataclass(frozen=True, slots=True)
class Finder:
    """Finds the tensors of weights among the headers of one checkpoint."""

    path: Path
    scheme: Scheme
    headers: Mapping[str, TensorInfo] = field(repr=False)

    def find(self, name: str, shape: Shape) -> Stored | None:
        """The weight `name` if it is there and quantised, else None."""
        stem, weight = name.removesuffix(".weight"), self.headers.get(name)
        if len(shape) != 2 or (weight is not None and weight.dtype in _PLAIN):
            return None
        if f"{stem}.qweight" in self.headers:
            return self._grouped(self.scheme.method, stem, name, shape)
        if f"{stem}.weight_packed" in self.headers:
            return self._packed(stem, name, shape)
        if weight is None:
            return None
        if weight.dtype == "I8":
            roles = {"codes": weight, **self._parts(stem, scales="weight_scale", zeros="weight_zero_point")}
            return self._checked(Stored(name, shape, roles, "int8", 8, self._group(shape, roles["scales"].shape[-1])))
        if weight.dtype == "F8_E4M3":
            return self._fp8(stem, weight, shape)
        raise UnsupportedModel(f"{self.path}: tensor {name} is of type {weight.dtype}; served are {', '.join(METHODS)}")

    def _grouped(self, method: str, stem: str, name: str, shape: Shape) -> Stored:
        """GPTQ and AWQ: matrices [in, out], of which GPTQ packs the rows and AWQ the columns."""
        roles = self._parts(stem, codes="qweight", scales="scales", zeros="qzeros", order="g_idx")
        packed = 0 if method == "gptq" else 1
        bits = 32 * roles["codes"].shape[packed] // shape[1 - packed]
        group = shape[1] if self.scheme.group < 0 else self.scheme.group
        return self._checked(Stored(name, shape, roles, method, bits, group, zero_offset=self.scheme.zero_offset))

    def _packed(self, stem: str, name: str, shape: Shape) -> Stored:
        names = {"codes": "weight_packed", "scales": "weight_scale", "zeros": "weight_zero_point", "order": "weight_g_idx"}
        roles = self._parts(stem, **names, shape="weight_shape")
        bits = 32 * roles["codes"].shape[1] // shape[1]
        return self._checked(Stored(name, shape, roles, "packed", bits, self._group(shape, roles["scales"].shape[-1])))

    def _fp8(self, stem: str, weight: TensorInfo, shape: Shape) -> Stored:
        scales = "weight_scale_inv" if f"{stem}.weight_scale_inv" in self.headers else "weight_scale"
        roles = {"codes": weight, **self._parts(stem, scales=scales)}
        found, (rows, cols) = roles["scales"].shape, shape
        if self.scheme.block is not None and found == (-(-rows // self.scheme.block[0]), -(-cols // self.scheme.block[1])):
            block = self.scheme.block
        else:
            block = (rows, cols) if math.prod(found) == 1 else (1, cols)
        return self._checked(Stored(weight.name, shape, roles, "fp8", 8, block=block))

    def _parts(self, stem: str, **roles: str) -> dict[str, TensorInfo]:
        """The tensors there are; codes and scales must be."""
        found = {role: self.headers[f"{stem}.{name}"] for role, name in roles.items() if f"{stem}.{name}" in self.headers}
        if "scales" not in found:
            raise CheckpointError(f"{self.path} has no {stem}.{roles['scales']}, the scales of {stem}; download it again")
        return found

    def _group(self, shape: Shape, groups: int) -> int:
        return shape[1] // max(1, groups)

    def _checked(self, stored: Stored) -> Stored:
        """Raises unless the tensors have the shapes that the matrix and its groups ask for."""
        (rows, cols), bits, name = stored.shape, stored.bits, stored.name
        if bits not in (4, 8) or (stored.form == "awq" and bits != 4):
            raise UnsupportedModel(f"{self.path}: {name} is packed in {bits} bit; served are {', '.join(METHODS)}")
        if stored.form == "fp8":
            high, wide = stored.block
            count = math.prod(stored.parts["scales"].shape)
            if stored.parts["codes"].shape != stored.shape or count != -(-rows // high) * -(-cols // wide):
                raise self._damaged(stored)
            if wide < cols and wide % UNIT:
                raise self._uneven(name, wide, cols)
            return stored
        if cols % UNIT or stored.group < UNIT or stored.group % UNIT:
            raise self._uneven(name, stored.group, cols)
        groups = -(-cols // stored.group)
        codes = {
            "gptq": (cols * bits // 32, rows), "awq": (cols, rows * bits // 32), "packed": (rows, cols * bits // 32),
        }.get(stored.form, stored.shape)  # fmt: skip
        scales = (groups, rows) if stored.form in ("gptq", "awq") else (rows, groups)
        found = stored.parts["scales"].shape
        if stored.parts["codes"].shape != codes or (found if len(found) == 2 else (*found, 1)) != scales:
            raise self._damaged(stored)
        return stored

    def _uneven(self, name: str, group: int, cols: int) -> UnsupportedModel:
        return UnsupportedModel(f"{self.path}: {name} has groups of {group} columns of {cols}; served are multiples of {UNIT}")

    def _damaged(self, stored: Stored) -> CheckpointError:
        shapes = ", ".join(f"{part.name} {list(part.shape)}" for part in stored.parts.values())
        return CheckpointError(
            f"{self.path}: {stored.name} should be {list(stored.shape)} in groups of {stored.group or stored.block}, but is "
            f"{shapes}; download the model again"
        )
