"""A text model that computes nothing and takes exactly the time it is told: stages of known speed for real links.

Sleeping needs no core, so many nodes on one machine are as fast as they would be on as many machines.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

from cake_core.checkpoint import Checkpoint, TensorInfo
from cake_core.errors import StageError
from cake_core.hookspecs import hookimpl
from cake_core.model import (
    BACKEND_API,
    Backend,
    Batch,
    Layer,
    LoadOptions,
    Memory,
    ModelInfo,
    Pending,
    Progress,
    SessionSpec,
    Tensor,
    TextStage,
    Tokenizer,
    int32_tensor,
)
from cake_core.plugins import Plugins
from cake_core.testing.toy_tokenizer import ToyTokenizer

LAYERS = 32


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds that all layers together take for a batch: `fixed`, to read the weights, or `each` a position if that is more.
    `hidden`: bytes of a position's hidden state."""

    fixed: float
    each: float
    hidden: int


class SleepingCheckpoint(Checkpoint):
    """`speed` is the whole model."""

    format = "safetensors"

    def __init__(self, speed: Speed) -> None:
        super().__init__(Path(__file__).parent, "sleeping")
        self.speed = speed

    @property
    def config(self) -> Mapping[str, Any]:
        return {"model_type": "sleeping"}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {}


class SleepingStage:
    def __init__(self, layers: tuple[str, ...], speed: Speed) -> None:
        self.layers = layers
        self._share = sum(name.startswith("model.layers.") for name in layers) / LAYERS
        self._speed = speed
        self._lengths: dict[int, int] = {}
        self._zeros = bytes(4096 * speed.hidden)
        self._due = 0.0

    def open(self, session: int, spec: SessionSpec, parent: int | None = None, length: int = 0) -> int:
        self._lengths[session] = length if parent is not None else 0
        return self._lengths[session]

    def submit(self, batch: Batch) -> Pending:
        for row in batch.rows:
            if self._lengths[row.session] != row.position:
                raise StageError(f"session {row.session} is at {self._lengths[row.session]}, not {row.position}")
            self._lengths[row.session] += row.length
        now = time.monotonic()
        # One batch right after another: kept by the clock, not by the sum of sleeps, each of which is a little too long.
        began = self._due if now - self._due < 0.0005 else now
        self._due = began + self._share * max(self._speed.fixed, self._speed.each * batch.positions)
        if (left := self._due - time.monotonic()) > 0:
            time.sleep(left)
        if "lm_head" in self.layers:
            return Pending.completed(Batch(batch.rows, {"tokens": int32_tensor([1] * sum(r.want.sample for r in batch.rows))}))
        view = memoryview(self._zeros)[: batch.positions * self._speed.hidden]
        return Pending.completed(Batch(batch.rows, {"hidden": Tensor("u8", (batch.positions, self._speed.hidden), view)}))

    def truncate(self, session: int, length: int) -> int:
        self._lengths[session] = min(length, self._lengths[session])
        return self._lengths[session]

    def close(self, session: int) -> None:
        self._lengths.pop(session, None)

    def memory(self) -> Memory:
        return Memory("cpu", "u8", 0, 1 << 20 if self._share else 0)

    def shutdown(self) -> None:
        self._lengths.clear()


class SleepingBackend:
    api: ClassVar[int] = BACKEND_API
    name = "sleeping"
    model_type: Literal["text", "image"] = "text"

    def accepts(self, checkpoint: Checkpoint) -> bool:
        return isinstance(checkpoint, SleepingCheckpoint)

    def describe(self, checkpoint: Checkpoint, options: LoadOptions) -> ModelInfo:
        names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(LAYERS)), "model.norm", "lm_head"]
        layers = tuple(Layer(name, 1, kv_bytes_per_token=int(".layers." in name)) for name in names)
        return ModelInfo(self.name, "text", checkpoint.name, "Sleeping", layers, vocab_size=256, context_length=1 << 16)

    def load(
        self,
        checkpoint: Checkpoint,
        info: ModelInfo,
        layers: Sequence[str],
        options: LoadOptions,
        progress: Progress | None = None,
    ) -> TextStage:
        assert isinstance(checkpoint, SleepingCheckpoint)
        return SleepingStage(tuple(layers), checkpoint.speed)

    def tokenizer(self, checkpoint: Checkpoint) -> Tokenizer:
        return ToyTokenizer()


def sleeping_plugins() -> Plugins:
    """Core's own plugins and this backend."""

    @hookimpl
    def cake_register_backends() -> Iterable[Backend]:
        return (SleepingBackend(),)

    plugins = Plugins(entries=())
    plugins.register("sleeping", SimpleNamespace(cake_register_backends=cake_register_backends))
    return plugins
