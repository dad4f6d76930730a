"""The decoder of the Llama family (Touvron et al., arXiv 2302.13971, and its kin), layer by layer.

T is the number of positions in a batch, rows of all sessions one after another; nothing here knows sessions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from cake_llama.attention import StepPlan, attend
from cake_llama.cache import KvCache
from cake_llama.config import ModelConfig
from cake_llama.names import EMBED, HEAD, block_parts
from cake_llama.rotary import rotate_
from cake_llama.weights import WeightSource

Project = Callable[[Tensor], Tensor]
"""[T, in] -> [T, out]. Quantised weights give their own."""


class Embedding(Protocol):
    """A table [vocabulary, hidden_size]: a tensor, or what quantised weights give."""

    def __getitem__(self, tokens: Tensor, /) -> Tensor:
        """i64 [T] -> [T, hidden_size]"""


@dataclass(frozen=True, slots=True)
class Dtypes:
    """What weights are kept in, and what is computed in: wider where the device lacks the arithmetic."""

    stored: torch.dtype
    computed: torch.dtype


@dataclass(frozen=True, slots=True)
class Linear:
    """Weights may be stored narrower than what is computed in: they are widened a matrix at a time."""

    weight: Tensor  # [out, in]
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight.dtype is x.dtype else self.weight.to(x.dtype)
        return linear(x, weight, self.bias)


@dataclass(frozen=True, slots=True)
class Norm:
    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class Block:
    """One transformer layer: attention and feed-forward, each after a norm and added to its input."""

    config: ModelConfig
    index: int
    """Among the blocks of this stage: which cache is its own."""
    window: int | None
    input_norm: Norm
    qkv: Project
    q_norm: Norm | None
    k_norm: Norm | None
    output: Project
    post_norm: Norm
    gate_up: Project
    down: Project

    def __call__(self, x: Tensor, plan: StepPlan, cache: KvCache) -> Tensor:
        x = x + self._attention(self.input_norm(x), plan, cache)
        return x + self._feed_forward(self.post_norm(x))

    def _attention(self, x: Tensor, plan: StepPlan, cache: KvCache) -> Tensor:
        heads, kv_heads, head_dim = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        qkv = self.qkv(x).view(len(x), heads + 2 * kv_heads, head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
            q.copy_(self.q_norm(q))
            k.copy_(self.k_norm(k))
        rotate_(qkv[:, : heads + kv_heads], *plan.turns(qkv.dtype))
        return self.output(attend(plan, cache, self.index, qkv, self.window))

    def _feed_forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)  # [T, gate and up]
        inner = both.shape[-1] // 2
        return self.down(silu(both[:, :inner]).mul_(both[:, inner:]))


@dataclass(slots=True)
class Parts:
    """The layers of one stage; None where it does not hold one."""

    embedding: Embedding | None
    blocks: Sequence[Block]
    norm: Norm | None
    head: Project | None
    dtype: torch.dtype = torch.float32
    """Of the hidden states inside; weights may be stored in another."""

    def hidden(self, tokens: Tensor | None, hidden: Tensor | None, plan: StepPlan, cache: KvCache) -> Tensor:
        """[T] ids or [T, hidden_size] through this stage's layers, the head left out."""
        if self.embedding is not None and tokens is not None:
            hidden = self.embedding[tokens].to(self.dtype)
        assert hidden is not None  # noqa: S101 - the stage has checked its inputs
        hidden = self.through_blocks(hidden, plan, cache)
        return hidden if self.norm is None else self.norm(hidden)

    def through_blocks(self, hidden: Tensor, plan: StepPlan, cache: KvCache) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden, plan, cache)
        return hidden


class Loader:
    """Builds layers from a source of weights. `moved(nbytes)` is told of each tensor that has been loaded."""

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        device: torch.device,
        dtypes: Dtypes,
        moved: Callable[[int], None] = lambda nbytes: None,  # noqa: ARG005
    ) -> None:
        self._config = config
        self._source = source
        self._device = device
        self._dtypes = dtypes
        self._moved = moved

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        loaded = self._source.load(name, dtype).to(self._device)
        self._moved(loaded.numel() * self._dtypes.stored.itemsize)
        return loaded

    def embedding(self) -> Embedding:
        return self.tensor(f"{EMBED}.weight", self._dtypes.stored)

    def head(self, shared: Embedding | None) -> Project:
        """`lm_head`, which is the embedding where the two are tied; `shared` if this stage holds it already."""
        if self._config.tied:
            return Linear(shared if isinstance(shared, Tensor) else self.tensor(f"{EMBED}.weight", self._dtypes.stored))
        return self.linear([HEAD])

    def linear(self, names: Sequence[str], bias: bool = False) -> Project:
        """Several are stacked into one, so that a step costs one product."""
        weight = self._stacked([f"{name}.weight" for name in names], self._dtypes.stored)
        return Linear(weight, self._stacked([f"{name}.bias" for name in names], self._dtypes.computed) if bias else None)

    def norm(self, name: str) -> Norm:
        return Norm(self.tensor(f"{name}.weight", self._dtypes.computed), self._config.norm_eps)

    def block(self, index: int, place: int) -> Block:
        """Layer `index` of the model, the `place`-th of its stage."""
        config, names = self._config, block_parts(self._config, index)
        return Block(
            config=config,
            index=place,
            window=config.windows[index],
            input_norm=self.norm(names["input_norm"][0]),
            qkv=self.linear(names["qkv"], config.qkv_bias),
            q_norm=self.norm(names["q_norm"][0]) if config.qk_norm else None,
            k_norm=self.norm(names["k_norm"][0]) if config.qk_norm else None,
            output=self.linear(names["output"], config.output_bias),
            post_norm=self.norm(names["post_norm"][0]),
            gate_up=self.linear(names["gate_up"], config.mlp_bias),
            down=self.linear(names["down"], config.mlp_bias),
        )

    def _stacked(self, names: Sequence[str], dtype: torch.dtype) -> Tensor:
        if len(names) == 1:
            return self.tensor(names[0], dtype)
        return torch.cat([self.tensor(name, dtype) for name in names])
