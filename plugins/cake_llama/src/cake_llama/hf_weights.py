"""Weights of quantised Hugging Face checkpoints (GPTQ, AWQ, FP8, compressed-tensors), as they are in the file.

An int32 holds codes from its lowest bits up. GPTQ stores [in, out] with codes packed down the columns, AWQ [in, out] packed
along the rows in an order of its own, compressed-tensors [out, in] packed along the rows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cake_core.checkpoint import Checkpoint, TensorInfo
from cake_core.errors import CheckpointError, UnsupportedModel
from cake_llama.hf_quant import Scheme, Stored
from cake_llama.packed import Groups, Packed, Scaled, pack_nibbles
from cake_llama.weights import SafetensorsWeights
from cake_llama.wire import bytes_of

log = logging.getLogger(__name__)

_AWQ_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
"""Which nibble of an int32 holds the first, second ... of eight neighbours."""
_DTYPES = {
    "I32": torch.int32, "I64": torch.int64, "I8": torch.int8, "F32": torch.float32, "F16": torch.float16,
    "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_PIECE_VALUES = 1 << 20


class QuantizedWeights(SafetensorsWeights):
    """`stored`: every weight by name, quantised or not."""

    def __init__(self, checkpoint: Checkpoint, stored: Mapping[str, Stored], scheme: Scheme) -> None:
        super().__init__(checkpoint)
        self._stored = {name: found for name, found in stored.items() if found.form != "plain"}
        here = checkpoint.tensors  # of a bundle, some
        self._names = tuple(n for n, found in stored.items() if all(part.name in here for part in found.parts.values()))
        self._held = ""
        """The matrix whose codes are in `_memory`."""
        self._memory = torch.empty(0, dtype=torch.int32)
        if scheme.activations:
            log.warning("%s: activations are not narrowed to 8 bit as its quantisation meant them to be", checkpoint.name)

    def names(self) -> tuple[str, ...]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape if name in self._stored else super().shape(name)

    def kind(self, name: str) -> str:
        stored = self._stored.get(name)
        if stored is None:
            return super().kind(name)
        return "F8" if stored.form == "fp8" else "G4" if stored.bits == 4 else "G8"

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Packed:
        stored = self._stored.get(name)
        if stored is None:
            return super().rows(name, start, stop)
        stop = stored.shape[0] if stop is None else stop
        return self._scaled(stored, start, stop) if stored.form == "fp8" else self._groups(stored, start, stop)

    def load(self, name: str, dtype: torch.dtype) -> Tensor:
        """Dequantised, piece by piece."""
        stored = self._stored.get(name)
        if stored is None:
            return super().load(name, dtype)
        rows, cols = stored.shape
        result = torch.empty((rows, cols), dtype=dtype)
        step = max(1, _PIECE_VALUES // cols)
        for start in range(0, rows, step):
            piece = self.rows(name, start, min(start + step, rows))
            own, values = result[start : start + step], piece.dequantized()
            if piece.order is None:
                own.copy_(values)
            else:
                own[:, piece.order] = values.to(dtype)
        return result

    def _scaled(self, stored: Stored, start: int, stop: int) -> Scaled:
        high, wide = stored.block
        by_block = (-(-stored.shape[0] // high), -(-stored.shape[1] // wide))
        scales = self._whole(stored.parts["scales"]).to(torch.float32).reshape(by_block)
        own = scales[start // high : -(-stop // high)]
        return Scaled(self._slice(stored.parts["codes"], start, stop), own, stored.block, start % high)

    def _groups(self, stored: Stored, start: int, stop: int) -> Groups:
        order, cols = self._order(stored), stored.shape[1]
        packed = torch.empty((stop - start, cols * stored.bits // 8), dtype=torch.uint8)
        step = max(1, _PIECE_VALUES // cols // 8) * 8  # a word of AWQ's holds eight rows
        for at in range(start, stop, step):
            codes = _CODES[stored.form](self, stored, at, min(at + step, stop))
            codes = codes if order is None else codes[:, order]
            packed[at - start : at - start + len(codes)] = pack_nibbles(codes) if stored.bits == 4 else codes
        scales = self._whole(stored.parts["scales"]).to(torch.float16)
        if stored.form in ("gptq", "awq"):
            scales = scales.T
        scales = scales.reshape(stored.shape[0], -1)[start:stop].contiguous()
        zeros = self._zeros(stored)[start:stop].contiguous()
        return Groups("G4" if stored.bits == 4 else "G8", packed, scales, zeros, stored.group, order)

    def _zeros(self, stored: Stored) -> Tensor:
        """u8 [rows, groups]"""
        rows, cols = stored.shape
        groups, half = -(-cols // stored.group), 1 << (stored.bits - 1)
        part = stored.parts.get("zeros")
        if part is None:
            return torch.full((rows, groups), half, dtype=torch.uint8)
        values = self._whole(part)
        if values.dtype is not torch.int32:
            return (values.reshape(rows, groups).to(torch.int16) + half).to(torch.uint8)
        if stored.form == "packed":
            return _codes(values, stored.bits).transpose(1, 2).reshape(-1, groups)[:rows]
        found = _codes(values, stored.bits)
        found = (found[..., _AWQ_PLACES] if stored.form == "awq" else found).reshape(groups, -1)[:, :rows].T
        if stored.bits == 8 and stored.zero_offset and bool((found == 255).any()):
            raise UnsupportedModel(f"{self._path}: {stored.name} has a zero above 255; use another quantisation of this model")
        return found + stored.zero_offset

    def _order(self, stored: Stored) -> Tensor | None:
        """Columns sorted by group, None where they are already."""
        part = stored.parts.get("order")
        if part is None:
            return None
        group_of = self._whole(part).to(torch.int64)
        expected = torch.arange(stored.shape[1]) // stored.group
        if torch.equal(group_of, expected) or bool((group_of < 0).all()):
            return None
        order = torch.argsort(group_of, stable=True)
        if not torch.equal(group_of[order], expected):
            raise CheckpointError(f"{self._path}: {part.name} makes groups of unequal size; download the model again")
        return order.to(torch.int32)

    def _whole(self, info: TensorInfo) -> Tensor:
        return self._slice(info, 0, info.shape[0] if info.shape else 1)

    def _slice(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 of one tensor of the file."""
        dtype = _DTYPES.get(info.dtype)
        if dtype is None:
            raise UnsupportedModel(f"{info.file}: tensor {info.name} is of type {info.dtype}; served are {', '.join(_DTYPES)}")
        result = torch.empty((stop - start, *info.shape[1:]), dtype=dtype)
        self._checkpoint.read_into(info, start * math.prod(info.shape[1:]) * dtype.itemsize, bytes_of(result))
        return result

    def _held_codes(self, stored: Stored) -> Tensor:
        """The codes of a matrix whose rows do not lie together, read once for all its pieces, into memory that is taken once
        for all matrices: what large temporaries leave behind between the weights would count with them."""
        info = stored.parts["codes"]
        if not len(self._memory):
            forms = (other for other in self._stored.values() if other.form in ("gptq", "awq"))
            self._memory = torch.empty(max(other.parts["codes"].nbytes for other in forms) // 4, dtype=torch.int32)
        codes = self._memory[: info.nbytes // 4].view(info.shape)
        if self._held != stored.name:
            self._held = ""
            self._checkpoint.read_into(info, 0, bytes_of(codes))
            self._held = stored.name
        return codes

    def gptq(self, stored: Stored, start: int, stop: int) -> Tensor:
        """u8 [rows, cols] of codes, as the next three."""
        own = self._held_codes(stored)[:, start:stop].T.contiguous()
        return _codes(own, stored.bits).reshape(stop - start, -1)

    def awq(self, stored: Stored, start: int, stop: int) -> Tensor:
        own = self._held_codes(stored)[:, start // 8 : -(-stop // 8)].contiguous()
        columns = _codes(own, 4)[..., _AWQ_PLACES].reshape(len(own), -1)
        return columns[:, start % 8 : start % 8 + stop - start].T

    def packed(self, stored: Stored, start: int, stop: int) -> Tensor:
        return _codes(self._slice(stored.parts["codes"], start, stop), stored.bits).reshape(stop - start, -1)

    def int8(self, stored: Stored, start: int, stop: int) -> Tensor:
        return self._slice(stored.parts["codes"], start, stop).view(torch.uint8) ^ 0x80


_CODES: Mapping[str, Callable[[QuantizedWeights, Stored, int, int], Tensor]] = {
    "gptq": QuantizedWeights.gptq, "awq": QuantizedWeights.awq,
    "packed": QuantizedWeights.packed, "int8": QuantizedWeights.int8,
}  # fmt: skip


def _codes(words: Tensor, bits: int) -> Tensor:
    """i32 [a, b] -> u8 [a, b, 32 / bits], lowest bits first."""
    found = words.view(torch.uint8).view(*words.shape, 4)  # every machine that torch runs on has the low byte first
    return found if bits == 8 else torch.stack((found & 15, found >> 4), -1).reshape(*words.shape, 8)
