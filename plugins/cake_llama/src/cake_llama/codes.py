"""What weights at the width of their file are made of: codes, scales and least values, on whichever device they are.

Layouts as in `dequant`, which has them as values; in shapes, n is the number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cake_llama.narrow_matrix import GROUP, Coded
from cake_llama.packed import Blocks, Groups, Packed


def coded(rows: Packed, device: torch.device) -> Coded | None:
    """The rows on a device; None for a type or group that the narrow form has no place for."""
    count, cols = rows.shape
    if cols % GROUP or rows.order is not None:
        return None
    if isinstance(rows, Groups):
        return _groups(rows, device) if cols % rows.group == 0 else None
    if not isinstance(rows, Blocks) or rows.kind not in _BLOCKS:
        return None
    width = 256 if rows.kind.endswith("_K") else 32
    found = _BLOCKS[rows.kind](rows.data.to(device).view(count * cols // width, -1))
    least = None if found.least is None else found.least.reshape(count, -1)
    return Coded(found.bits, found.codes.reshape(count, cols), found.scales.reshape(count, -1), least)


def _groups(rows: Groups, device: torch.device) -> Coded:
    again = rows.group // GROUP
    scales = rows.scales.to(device, torch.float32).repeat_interleave(again, 1)
    zeros = rows.zeros.to(device, torch.float32).repeat_interleave(again, 1)
    codes = rows.codes.to(device)
    four = rows.kind == "G4"
    return Coded(4 if four else 8, _nibbles(codes, 16).reshape(rows.shape) if four else codes, scales, -zeros * scales)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The f16 at byte `at` of each block: f32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).to(torch.float32)


def _nibbles(packed: Tensor, group: int) -> Tensor:
    """Of each `group` bytes first all low nibbles, then all high ones: [n, bytes] -> [n, groups, 2 * group]."""
    grouped = packed.reshape(len(packed), -1, group)
    return torch.cat((grouped & 0x0F, grouped >> 4), -1)


def _bits(packed: Tensor, group: int, width: int) -> Tensor:
    """Of each `group` bytes all fields of `width` bits, lowest first: [n, bytes] -> [n, groups, 8 / width, group]."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return (packed.reshape(len(packed), -1, 1, group) >> shifts[:, None]) & (1 << width) - 1


def _fifth_bits(packed: Tensor) -> Tensor:
    """32 bits, one a value, as the fifth bit of it: [n, 4] -> [n, 32]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (((packed[:, :, None] >> shifts) & 1) << 4).reshape(len(packed), 32)


def _both(scale: Tensor) -> Tensor:
    return scale.repeat_interleave(2, -1)


def _q4_0(blocks: Tensor) -> Coded:
    return Coded(4, _nibbles(blocks[:, 2:], 16), _both(_half(blocks, 0)), None)


def _q4_1(blocks: Tensor) -> Coded:
    return Coded(4, _nibbles(blocks[:, 4:], 16), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Tensor) -> Coded:
    codes = _nibbles(blocks[:, 6:], 16)[:, 0] | _fifth_bits(blocks[:, 2:6])
    return Coded(5, codes, _both(_half(blocks, 0)), None)


def _q5_1(blocks: Tensor) -> Coded:
    codes = _nibbles(blocks[:, 8:], 16)[:, 0] | _fifth_bits(blocks[:, 4:8])
    return Coded(5, codes, _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Tensor) -> Coded:
    return Coded(8, blocks[:, 2:] ^ 128, _both(_half(blocks, 0)), None)  # i8 + 128, as u8


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and minima of Q4_K and Q5_K, times the block's own: [n, 8] each."""
    packed = blocks[:, 4:16].reshape(-1, 3, 4)
    first, second, rest = packed[:, 0], packed[:, 1], packed[:, 2]
    scales = torch.cat((first & 63, (rest & 0x0F) | first >> 6 << 4), -1).to(torch.float32)
    minima = torch.cat((second & 63, rest >> 4 | second >> 6 << 4), -1).to(torch.float32)
    return _half(blocks, 0) * scales, _half(blocks, 2) * -minima


def _q4_k(blocks: Tensor) -> Coded:
    return Coded(4, _nibbles(blocks[:, 16:], 32), *_scales_and_minima(blocks))


def _q5_k(blocks: Tensor) -> Coded:
    high = _bits(blocks[:, 16:48], 32, 1)[:, 0]
    codes = _nibbles(blocks[:, 48:], 32).reshape(-1, 8, 32) | high << 4
    return Coded(5, codes, *_scales_and_minima(blocks))


def _q6_k(blocks: Tensor) -> Coded:
    low = _nibbles(blocks[:, :128], 64).reshape(-1, 8, 32)
    codes = low | _bits(blocks[:, 128:192], 32, 2).reshape(-1, 8, 32) << 4
    return Coded(6, codes, _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).to(torch.float32), None)


_BLOCKS: dict[str, Callable[[Tensor], Coded]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
