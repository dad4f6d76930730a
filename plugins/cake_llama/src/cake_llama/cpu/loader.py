"""Layers from a source of weights at the width of the file, for the CPU.

With cake-kernels weights are packed as they are read and multiplied as they are; without, they stay as in the file and are
dequantised a tile at a time. Norms and biases are f32, and so are all values between the products.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cake_core.errors import CheckpointError
from cake_llama.config import ModelConfig
from cake_llama.cpu.tiled import TiledEmbedding, TiledLinear
from cake_llama.model import Dtypes, Embedding, Loader, Parts, Project
from cake_llama.names import EMBED, HEAD
from cake_llama.packed import PLAIN, Blocks, Packed, Scaled, grouped, stored
from cake_llama.weights import WeightSource

if TYPE_CHECKING:
    from cake_llama.cache import KvCache
    from cake_llama.cpu.linear import Weight

log = logging.getLogger(__name__)

PIECE_BYTES = 1 << 24
"""Bytes of weights read at a time."""


@dataclass(frozen=True, slots=True)
class Treatment:
    """What becomes of the weights: converted to `dtype` (None: left as they are), used by `threads`."""

    dtype: torch.dtype | None
    threads: int


class FileWidthLoader(Loader):
    """With PyTorch alone."""

    def __init__(self, config: ModelConfig, source: WeightSource, how: Treatment, moved: Callable[[int], None]) -> None:
        super().__init__(config, source, torch.device("cpu"), Dtypes(torch.float32, torch.float32), moved)
        self._keep = how.dtype

    def linear(self, names: Sequence[str], bias: bool = False) -> Project:
        return TiledLinear(tuple(self._rows(f"{name}.weight") for name in names), self._biases(names) if bias else None)

    def embedding(self) -> Embedding:
        return TiledEmbedding(self._rows(f"{EMBED}.weight"))

    def head(self, shared: Embedding | None) -> Project:
        if not self._config.tied:
            return self.linear([HEAD])
        rows = shared.table if isinstance(shared, TiledEmbedding) else self._rows(f"{EMBED}.weight")
        return TiledLinear((rows,), None)

    def finish(self, parts: Parts, cache: KvCache) -> Parts:
        """The parts once the cache is there, which a decoder writes into."""
        return parts

    def _rows(self, name: str) -> Packed:
        """A matrix as it will be multiplied."""
        rows = self._source.rows(name) if self._keep is None else stored(self._source.load(name, self._keep))
        self._moved(rows.nbytes)
        return grouped(rows) if isinstance(rows, Blocks) else rows

    def _biases(self, names: Sequence[str]) -> Tensor:
        return torch.cat([self.tensor(f"{name}.bias", torch.float32) for name in names])


class NativeLoader(FileWidthLoader):
    """With cake-kernels, whose threads are its pool's."""

    def __init__(self, config: ModelConfig, source: WeightSource, how: Treatment, moved: Callable[[int], None]) -> None:
        import cake_kernels

        super().__init__(config, source, how, moved)
        self._pool = cake_kernels.Pool(how.threads)

    def linear(self, names: Sequence[str], bias: bool = False) -> Project:
        from cake_llama.cpu.linear import NativeLinear

        weights = tuple(weight for name in names for weight in self._weights(name))
        return NativeLinear(weights, self._biases(names) if bias else None, self._pool)

    def embedding(self) -> Embedding:
        from cake_llama.cpu.linear import NativeEmbedding

        return NativeEmbedding(self._weight(f"{EMBED}.weight"))

    def head(self, shared: Embedding | None) -> Project:
        from cake_llama.cpu.linear import NativeEmbedding, NativeLinear

        if not self._config.tied:
            return self.linear([HEAD])
        weight = shared.weight if isinstance(shared, NativeEmbedding) else self._weight(f"{EMBED}.weight")
        return NativeLinear((weight,), None, self._pool)

    def finish(self, parts: Parts, cache: KvCache) -> Parts:
        from cake_llama.cpu.decoder import NativeParts, make_decoder

        decoder = make_decoder(self._config, parts.blocks, cache)
        if decoder is None:
            return parts
        return NativeParts(parts.embedding, parts.blocks, parts.norm, parts.head, parts.dtype, decoder=decoder)

    def _weights(self, name: str) -> Iterator[Weight]:
        """The matrices of a projection: what a checkpoint has fused is taken apart, as the decoder wants it."""
        config = self._config
        q, kv, inner = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.intermediate_size
        fused = {"qkv_proj": (q, kv, kv), "gate_up_proj": (inner, inner)}.get(name.rsplit(".", 1)[-1])
        if fused is None:
            yield self._weight(f"{name}.weight")
            return
        start = 0
        for count in fused:
            yield self._weight(f"{name}.weight", start, start + count)
            start += count

    def _weight(self, name: str, start: int = 0, stop: int | None = None) -> Weight:
        """Rows start .. stop - 1 of a tensor as the kernels want them."""
        from cake_kernels import PLAIN, TYPES
        from cake_llama.cpu.linear import plain_weight, scaled_weight

        kind = self._source.kind(name)
        if self._keep is not None:
            whole: Packed = stored(self._source.load(name, self._keep)[start:stop])
        elif kind in PLAIN or kind == "F8":
            whole = self._source.rows(name, start, stop)
        elif kind in TYPES:
            return self._packed(name, start, stop)
        else:
            return self._widened(name, kind, start, stop)
        self._moved(whole.nbytes)
        return scaled_weight(whole) if isinstance(whole, Scaled) else plain_weight(whole)

    def _packed(self, name: str, start: int, stop: int | None) -> Weight:
        """Read and packed piece by piece."""
        from cake_llama.cpu.linear import PIECE_ROWS, Packing

        count, cols = self._source.shape(name)
        stop = count if stop is None else stop
        step = max(1, PIECE_BYTES // (4 * cols) // PIECE_ROWS) * PIECE_ROWS
        packing: Packing | None = None
        for at in range(start, stop, step):
            piece = self._source.rows(name, at, min(at + step, stop))
            packing = packing or Packing((stop - start, cols), piece, self._pool)
            packing.put(at - start, piece)
            self._moved(piece.nbytes)
        if packing is None:
            raise CheckpointError(f"{name} has no rows; download the model again")
        return packing.weight

    def _widened(self, name: str, kind: str, start: int, stop: int | None) -> Weight:
        from cake_llama.cpu.linear import plain_weight

        loaded = stored(self._source.load(name, torch.float16)[start:stop])
        rows = self._source.rows(name, start, stop)
        log.warning(
            "%s is of type %s, which no kernel multiplies as it is: it takes %.0f MB as f16 instead of %.0f MB",
            name, kind, loaded.nbytes / 1e6, rows.nbytes / 1e6,
        )  # fmt: skip
        self._moved(rows.nbytes)
        return plain_weight(loaded)


def has_kernels() -> bool:
    """Whether cake-kernels is installed and its library loads."""
    try:
        import cake_kernels  # noqa: F401
    except ImportError:
        return False
    return True


def cpu_loader(
    config: ModelConfig, source: WeightSource, how: Treatment, moved: Callable[[int], None]
) -> FileWidthLoader | None:
    """The loader for a stage on the CPU; None where PyTorch's own layers serve best: plain weights without cake-kernels."""
    if has_kernels():
        return NativeLoader(config, source, how, moved)
    kinds = {source.kind(name) for name in source.names() if len(source.shape(name)) == 2}
    if how.dtype is not None or kinds <= set(PLAIN.values()):
        return None
    log.warning(
        "cake-kernels is not installed: %s weights are dequantised at every step, which is slow; install cake-kernels, or "
        "widen them at load with --dtype f32 where memory is plenty",
        "/".join(sorted(kinds)),
    )
    return FileWidthLoader(config, source, how, moved)
