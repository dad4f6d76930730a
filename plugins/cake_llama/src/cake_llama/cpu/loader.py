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

from cake_core.errors import ConfigError
from cake_llama.config import ModelConfig
from cake_llama.cpu.quantize import GROUP, quantized
from cake_llama.cpu.tiled import TiledEmbedding, TiledLinear
from cake_llama.model import Dtypes, Embedding, Loader, Parts, Project
from cake_llama.names import EMBED, HEAD
from cake_llama.packed import Blocks, Packed, stored
from cake_llama.weights import WeightSource

if TYPE_CHECKING:
    from cake_llama.cache import KvCache
    from cake_llama.cpu.linear import Weight

log = logging.getLogger(__name__)

PIECE_BYTES = 1 << 24
"""Bytes of weights read at a time."""


@dataclass(frozen=True, slots=True)
class Treatment:
    """What becomes of the weights: converted to `dtype` (None: left as they are), narrowed to `quantize`, used by `threads`."""

    dtype: torch.dtype | None
    quantize: str | None
    threads: int


class FileWidthLoader(Loader):
    """With PyTorch alone. `dtype`: convert weights to it; None leaves them as they are in the file."""

    native = False
    """Whether products are made on the packed weights, not on dequantised tiles."""

    def __init__(
        self, config: ModelConfig, source: WeightSource, dtype: torch.dtype | None, moved: Callable[[int], None]
    ) -> None:
        super().__init__(config, source, torch.device("cpu"), Dtypes(torch.float32, torch.float32), moved)
        self._keep = dtype

    def linear(self, names: Sequence[str], bias: bool = False) -> Project:
        rows = tuple(self._rows(f"{name}.weight") for name in names)
        self._moved(sum(part.nbytes for part in rows))
        return TiledLinear(rows, self._biases(names) if bias else None)

    def embedding(self) -> Embedding:
        rows = self._rows(f"{EMBED}.weight")
        self._moved(rows.nbytes)
        return TiledEmbedding(rows)

    def head(self, shared: Embedding | None) -> Project:
        if not self._config.tied:
            return self.linear([HEAD])
        rows = shared.table if isinstance(shared, TiledEmbedding) else self._rows(f"{EMBED}.weight")
        return TiledLinear((rows,), None)

    def finish(self, parts: Parts, cache: KvCache) -> Parts:
        """The parts once the cache is there, which a decoder writes into."""
        return parts

    def _rows(self, name: str) -> Packed:
        return self._source.rows(name) if self._keep is None else stored(self._source.load(name, self._keep))

    def _biases(self, names: Sequence[str]) -> Tensor:
        return torch.cat([self.tensor(f"{name}.bias", torch.float32) for name in names])


class NativeLoader(FileWidthLoader):
    """With cake-kernels, whose threads are its pool's. `how.quantize`: narrow the weights to int8 or int4."""

    native = True

    def __init__(self, config: ModelConfig, source: WeightSource, how: Treatment, moved: Callable[[int], None]) -> None:
        import cake_kernels

        super().__init__(config, source, how.dtype, moved)
        self._quantize = how.quantize
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
        """Rows start .. stop - 1 of a tensor, read and packed piece by piece."""
        from cake_kernels import PLAIN, TYPES
        from cake_llama.cpu.linear import plain_weight

        if self._quantize is not None and self._source.shape(name)[1] % GROUP == 0:
            return self._packed(name, start, stop)
        if self._keep is not None:
            rows = stored(self._source.load(name, self._keep)[start:stop])
            self._moved(rows.nbytes)
            return plain_weight(rows)
        head = self._source.rows(name, start, start + 1)
        kind = head.kind
        if kind not in TYPES:
            return self._widened(name, kind, start, stop)
        if isinstance(head, Blocks) and kind in PLAIN:
            whole = self._source.rows(name, start, stop)
            self._moved(whole.nbytes)
            return plain_weight(whole)  # type: ignore[arg-type]
        return self._packed(name, start, stop)

    def _packed(self, name: str, start: int, stop: int | None) -> Weight:
        """Read, narrowed if that was asked for, and packed piece by piece."""
        from cake_llama.cpu.linear import PIECE_ROWS, Packing

        stop = self._source.shape(name)[0] if stop is None else stop
        head = self._treated(name, start, start + 1)
        packing = Packing(head.kind, (stop - start, head.shape[1]), head.group, self._pool)
        step = max(1, PIECE_BYTES // (4 * head.shape[1]) // PIECE_ROWS) * PIECE_ROWS
        for at in range(start, stop, step):
            piece = self._treated(name, at, min(at + step, stop))
            packing.put(at - start, piece)
            self._moved(piece.nbytes)
        return packing.weight

    def _treated(self, name: str, start: int, stop: int) -> Packed:
        """Rows as they will be multiplied. The embedding and the head are not narrowed below 8 bit."""
        rows = self._source.rows(name, start, stop)
        if self._quantize is None:
            return rows
        whole = name.startswith((f"{EMBED}.", f"{HEAD}."))
        return quantized(rows.dequantized(), "int8" if whole else self._quantize)

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
    """The loader for a stage on the CPU; None where PyTorch's own layers serve best: plain weights without cake-kernels.

    Raises ConfigError when weights are to be narrowed without cake-kernels.
    """
    if has_kernels():
        return NativeLoader(config, source, how, moved)
    if how.quantize is not None:
        raise ConfigError(f"--quantize {how.quantize} needs cake-kernels; install it, or leave --quantize out")
    kinds = {source.rows(name, 0, 1).kind for name in source.names() if len(source.shape(name)) == 2}
    if how.dtype is not None or kinds <= {"F32", "F16", "BF16"}:
        return None
    log.warning(
        "cake-kernels is not installed: %s weights are dequantised, at load where memory suffices and at every step, which is "
        "slow, where not; install cake-kernels",
        "/".join(sorted(kinds)),
    )
    return FileWidthLoader(config, source, None, moved)
