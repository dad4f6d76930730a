"""Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864) and the ways to stretch it beyond the trained length.

A position's angle may depend on the length of its sequence (`dynamic`, `longrope`). What counts as the length is what
transformers' own generation gives: for a prompt the whole prompt, for a generated token the tokens up to and including it.
So a position's angle never depends on how the prompt was cut into chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cake_core.errors import CheckpointError
from cake_llama.config import RopeConfig

Span = tuple[int, int, int]
"""Positions of a sequence, from and up to, and the length of its prompt."""

_ROWS = 1024
"""Positions in a table of angles at first."""


class Rotary:
    """Cosines and sines for positions, in f32."""

    def __init__(self, config: RopeConfig, device: torch.device) -> None:
        self.config = config
        self.attention_factor = _attention_factor(config)
        self.device = device
        self._frequencies = {False: self._to(_frequencies(config, False)), True: self._to(_frequencies(config, True))}
        self._table = self._angles_to(0)

    def _to(self, values: Tensor) -> Tensor:
        return values.to(self.device, torch.float32)

    def of(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """cos and sin for the positions of all spans, one after another: [T, dim / 2] each, contiguous."""
        if self.device.type == "cpu" and not self.config.depends_on_length:
            return self._looked_up(spans)
        positions = [position for start, stop, _ in spans for position in range(start, stop)]
        lengths = [max(prompt, position + 1) for start, stop, prompt in spans for position in range(start, stop)]
        return self.angles(torch.tensor(positions, device=self.device), torch.tensor(lengths, device=self.device))

    def _looked_up(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """From a table that grows with the longest sequence: on a CPU a step would take longer to compute them anew."""
        last = max(stop for _, stop, _ in spans)
        if last > len(self._table[0]):
            self._table = self._angles_to(max(_ROWS, 1 << (last - 1).bit_length()))
        cos, sin = self._table
        if len(spans) == 1:
            ((start, stop, _),) = spans
            return cos[start:stop], sin[start:stop]
        return (
            torch.cat([cos[start:stop] for start, stop, _ in spans]),
            torch.cat([sin[start:stop] for start, stop, _ in spans]),
        )

    def _angles_to(self, stop: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(stop, device=self.device)
        return self.angles(positions, positions + 1)

    def angles(self, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for `positions` [T] in sequences of `lengths` [T]: [T, dim / 2] each."""
        angles = positions.to(torch.float32)[:, None] * self._inverse(lengths)
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor

    def _inverse(self, lengths: Tensor) -> Tensor:
        config = self.config
        if config.kind == "longrope":
            long = (lengths > config.original_length)[:, None]
            return torch.where(long, self._frequencies[True], self._frequencies[False])
        if config.kind == "dynamic":
            # NTK-aware: the base grows with the length, so the slowest frequency is stretched just as much as needed.
            factor, dim = config.factor, config.dim
            ratio = (factor * lengths.to(torch.float64) / config.context_length - (factor - 1)).clamp(min=1.0)
            base = config.theta * ratio ** (dim / (dim - 2))
            powers = torch.arange(0, dim, 2, dtype=torch.float64, device=lengths.device) / dim
            return (base[:, None] ** -powers).to(torch.float32)
        return self._frequencies[False]


def for_rotation(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Angles as `rotate_` takes them, [T, 1, dim] each, with its signs in them."""
    return torch.cat((cos, cos), -1)[:, None].to(dtype), torch.cat((-sin, sin), -1)[:, None].to(dtype)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turns the first dimensions of every head of x [T, heads, head_dim] in place, halves paired as in GPT-NeoX."""
    turning = x[..., : cos.shape[-1]]
    half = cos.shape[-1] // 2
    swapped = torch.cat((turning[..., half:], turning[..., :half]), -1)
    turning.mul_(cos).addcmul_(swapped, sin)


def _frequencies(config: RopeConfig, long: bool) -> Tensor:
    """Inverse frequencies [dim / 2], radians a position."""
    powers = torch.arange(0, config.dim, 2, dtype=torch.float64) / config.dim
    base = config.theta**-powers
    match config.kind:
        case "linear":
            return base / config.factor
        case "llama3":
            return _llama3(config, base)
        case "yarn":
            return _yarn(config, base)
        case "longrope":
            factors = torch.tensor(config.parameters["long_factor" if long else "short_factor"], dtype=torch.float64)
            if factors.shape != base.shape:
                raise CheckpointError(f"longrope has {len(factors)} factors for {len(base)} frequencies; check config.json")
            return base / factors
        case _:
            return base


def _llama3(config: RopeConfig, base: Tensor) -> Tensor:
    """Llama 3.1: slow frequencies divided by `factor`, fast ones kept, those between blended."""
    p = config.parameters
    low, high, factor = float(p["low_freq_factor"]), float(p["high_freq_factor"]), config.factor
    turns = config.original_length * base / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return base * (blend + (1 - blend) / factor)


def _yarn(config: RopeConfig, base: Tensor) -> Tensor:
    """YaRN (Peng et al., arXiv 2309.00071): interpolation for slow dimensions, none for fast ones, a ramp between."""
    p, dim = config.parameters, config.dim

    def dimension(turns: float) -> float:
        return dim * math.log(config.original_length / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(float(p.get("beta_fast") or 32)), dimension(float(p.get("beta_slow") or 1))
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return base / config.factor * ramp + base * (1 - ramp)


def _attention_factor(config: RopeConfig) -> float:
    """What cosines and sines are multiplied with, which scales attention scores by its square."""
    p = config.parameters
    given = p.get("attention_factor")
    if config.kind == "yarn":
        if given is not None:
            return float(given)
        factor = config.factor
        mscale, mscale_all = p.get("mscale"), p.get("mscale_all_dim")
        if mscale and mscale_all:
            return _mscale(factor, float(mscale)) / _mscale(factor, float(mscale_all))
        return _mscale(factor, 1.0)
    if config.kind == "longrope":
        if given is not None:
            return float(given)
        factor = config.factor
        return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(config.original_length))
    return 1.0


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
