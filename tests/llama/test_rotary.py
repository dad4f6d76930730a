"""Angles that are looked up are those that are computed, to the bit."""

from __future__ import annotations

import pytest
import torch

from cake_llama.config import RopeConfig
from cake_llama.rotary import Rotary, Span

STRETCHED = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ONE_AFTER_ANOTHER: list[list[Span]] = [
    [(0, 7, 7)],
    [(7, 8, 7)],
    [(1020, 1030, 1030)],  # past the end of the first table
    [(3, 4, 2), (5000, 5003, 9), (0, 1, 1)],
    [(8, 9, 7)],
]


@pytest.mark.parametrize("kind", ["default", "llama3", "dynamic"])
def test_angles_of_spans(kind: str) -> None:
    config = RopeConfig(theta=10000.0, dim=32, kind=kind, parameters=STRETCHED, context_length=64)
    rotary = Rotary(config, torch.device("cpu"))
    for spans in ONE_AFTER_ANOTHER:
        positions = [p for start, stop, _ in spans for p in range(start, stop)]
        lengths = [max(prompt, p + 1) for start, stop, prompt in spans for p in range(start, stop)]
        wanted = rotary.angles(torch.tensor(positions), torch.tensor(lengths))
        for found, computed in zip(rotary.of(spans), wanted, strict=True):
            assert found.is_contiguous()
            assert torch.equal(found, computed)
