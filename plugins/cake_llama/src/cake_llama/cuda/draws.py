"""Draws for the rows of a batch at once, on the device and without waiting: `cake_core.sampling` for requests without
penalties, in f64 like it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cake_core.requests import SamplingParams


class Draws:
    """The parameters of a batch's rows as tensors."""

    def __init__(self, params: Sequence[SamplingParams], uniforms: Sequence[float], device: torch.device) -> None:
        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)[:, None]

        self._greedy = column([float(p.temperature == 0) for p in params])[:, 0] > 0
        self._temperature = column([p.temperature or 1.0 for p in params])
        self._min_p = column([p.min_p for p in params])
        self._uniforms = column(uniforms)
        self._ranked = any(p.top_k or p.top_p < 1 for p in params)
        self._top_k = column([p.top_k or 1 << 40 for p in params])
        self._top_p = column([p.top_p if p.top_p < 1 else 2.0 for p in params])

    def draw(self, logits: Tensor, best: Tensor) -> Tensor:
        """[B, vocabulary] f32 and their argmax [B] -> tokens [B]."""
        scores = logits.to(torch.float64)
        weights = ((scores - scores.max(-1, keepdim=True).values) / self._temperature).exp()
        kept = weights >= self._min_p
        if self._ranked:
            kept &= self._among_best(weights)
        sums = torch.where(kept, weights, 0.0).cumsum(-1)
        chosen = (sums > self._uniforms * sums[:, -1:]).to(torch.uint8).argmax(-1)
        return torch.where(self._greedy, best, chosen)

    def _among_best(self, weights: Tensor) -> Tensor:
        """Mask of what top_k and top_p keep, ties to the lower id."""
        ranked, order = weights.sort(descending=True, stable=True, dim=-1)
        rank = torch.arange(weights.shape[-1], device=weights.device)
        in_k = rank < self._top_k
        of_k = torch.where(in_k, ranked, 0.0)
        before = of_k.cumsum(-1) - of_k
        in_p = (before < self._top_p * of_k.sum(-1, keepdim=True)) | (rank == 0)
        return torch.zeros_like(in_k).scatter_(-1, order, in_k & in_p)
