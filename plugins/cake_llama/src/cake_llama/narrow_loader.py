"""Layers at the width of the file, or narrowed while they are loaded, on devices other than the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cake_llama.codes import coded
from cake_llama.config import ModelConfig
from cake_llama.model import Dtypes, Embedding, Loader, Project
from cake_llama.names import EMBED, HEAD
from cake_llama.narrow_matrix import Narrow, NarrowEmbedding, NarrowLinear, joined, pack, stacked
from cake_llama.packed import PLAIN
from cake_llama.weights import WeightSource

log = logging.getLogger(__name__)

PIECE_VALUES = 1 << 22
"""Values treated at a time, so that a load needs little beside the weights themselves."""


class NarrowLoader(Loader):
    """`kernels`: whether Triton multiplies them."""

    def __init__(
        self, config: ModelConfig, source: WeightSource, device: torch.device, dtypes: Dtypes, kernels: bool,
        moved: Callable[[int], None],
    ) -> None:  # fmt: skip
        super().__init__(config, source, device, dtypes, moved)
        self._kernels = kernels

    def linear(self, names: Sequence[str], bias: bool = False) -> Project:
        parts = [self._narrow(f"{name}.weight") for name in names]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return super().linear(names, bias)
        biases = torch.cat([self.tensor(f"{name}.bias", self._dtypes.computed) for name in names]) if bias else None
        return self._multiplied(found, biases)

    def embedding(self) -> Embedding:
        weight = self._narrow(f"{EMBED}.weight")
        if weight is None:
            return super().embedding()
        if not self._kernels:
            return NarrowEmbedding(weight)
        from cake_llama.cuda.narrow_ops import CudaEmbedding

        return CudaEmbedding(weight, self._dtypes.computed)

    def head(self, shared: Embedding | None) -> Project:
        if not self._config.tied:
            return self.linear([HEAD])
        weight = shared.weight if isinstance(shared, NarrowEmbedding) else None
        if weight is None and shared is None:
            weight = self._narrow(f"{EMBED}.weight")
        return super().head(shared) if weight is None else self._multiplied([weight], None)

    def _multiplied(self, parts: list[Narrow], bias: Tensor | None) -> NarrowLinear:
        if not self._kernels:
            return NarrowLinear(stacked(parts), bias)
        from cake_llama.cuda.narrow_ops import CudaLinear

        return CudaLinear(stacked(parts), bias)

    def _narrow(self, name: str) -> Narrow | None:
        """A matrix in the narrow form; None where it is plain, or of a kind that has to be widened."""
        kind = self._source.kind(name)
        if kind in PLAIN.values():
            return None
        if coded(self._source.rows(name, 0, 1), self._device) is None:
            log.warning("%s is of type %s, which is widened to %s on %s", name, kind, self._dtypes.stored, self._device)
            return None
        weight = joined(list(self._packed(name)))
        self._moved(weight.nbytes)
        return weight

    def _packed(self, name: str) -> Iterator[Narrow]:
        rows, cols = self._source.shape(name)
        step = max(1, PIECE_VALUES // cols)
        for start in range(0, rows, step):
            found = coded(self._source.rows(name, start, min(start + step, rows)), self._device)
            assert found is not None  # noqa: S101 - all rows of a matrix are of one kind, and its first has been tried
            yield pack(found)
