"""The decoder of the Llama family (Touvron et al., arXiv 2302.13971, and its kin), layer by layer.

T is the number of positions in a batch, rows of all sessions one after another; nothing here knows sessions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from cake_llama.attention import StepPlan, attend
from cake_llama.cache import KvCache
from cake_llama.config import ModelConfig
from cake_llama.names import EMBED, HEAD, block_name
from cake_llama.rotary import rotate
from cake_llama.weights import WeightSource

Project = Callable[[Tensor], Tensor]
"""[T, in] -> [T, out]. Quantised weights give their own."""


@dataclass(frozen=True, slots=True)
class Linear:
    weight: Tensor  # [out, in]
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


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
        gate, up = self.gate_up(self.post_norm(x)).chunk(2, -1)  # [T, intermediate] each
        return x + self.down(silu(gate) * up)

    def _attention(self, x: Tensor, plan: StepPlan, cache: KvCache) -> Tensor:
        c = self.config
        heads = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
        q, k, v = (
            part.view(len(x), count, c.head_dim)
            for part, count in zip(torch.split(self.qkv(x), [n * c.head_dim for n in heads], -1), heads, strict=True)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, plan.cos, plan.sin), rotate(k, plan.cos, plan.sin)
        return self.output(attend(plan, cache, self.index, q, k, v, self.window))


@dataclass(slots=True)
class Parts:
    """The layers of one stage; None where it does not hold one."""

    embedding: Tensor | None
    blocks: Sequence[Block]
    norm: Norm | None
    head: Project | None

    def hidden(self, tokens: Tensor | None, hidden: Tensor | None, plan: StepPlan, cache: KvCache) -> Tensor:
        """[T] ids or [T, hidden_size] through this stage's layers, the head left out."""
        if self.embedding is not None and tokens is not None:
            hidden = self.embedding[tokens]
        assert hidden is not None  # noqa: S101 - the stage has checked its inputs
        for block in self.blocks:
            hidden = block(hidden, plan, cache)
        return hidden if self.norm is None else self.norm(hidden)


# Loading: one table of names


def block_tensors(config: ModelConfig, index: int) -> dict[str, tuple[str, ...]]:
    """Names of a block's weights by our part; several are stacked, in this order. Biases stand beside them as `.bias`."""
    prefix = f"{block_name(index)}."
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    names = {
        "input_norm": (f"{prefix}input_layernorm",),
        "post_norm": (f"{prefix}post_attention_layernorm",),
        "qkv": (f"{attention}qkv_proj",) if config.fused else tuple(f"{attention}{x}_proj" for x in "qkv"),
        "output": (f"{attention}o_proj",),
        "gate_up": (f"{mlp}gate_up_proj",) if config.fused else (f"{mlp}gate_proj", f"{mlp}up_proj"),
        "down": (f"{mlp}down_proj",),
    }
    if config.qk_norm:
        names |= {"q_norm": (f"{attention}q_norm",), "k_norm": (f"{attention}k_norm",)}
    return names


class Loader:
    """Builds layers from a source of weights, on one device and in one dtype. `moved(nbytes)` is told of each tensor."""

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        device: torch.device,
        dtype: torch.dtype,
        moved: Callable[[int], None] = lambda nbytes: None,  # noqa: ARG005
    ) -> None:
        self._config = config
        self._source = source
        self._names = frozenset(source.names())
        self._device = device
        self._dtype = dtype
        self._moved = moved

    def tensor(self, name: str) -> Tensor:
        loaded = self._source.load(name, self._dtype).to(self._device)
        self._moved(loaded.numel() * loaded.element_size())
        return loaded

    def linear(self, names: Sequence[str], bias: bool = False) -> Project:
        weights = self._stacked([f"{name}.weight" for name in names])
        return Linear(weights, self._stacked([f"{name}.bias" for name in names]) if bias else None)

    def norm(self, name: str) -> Norm:
        return Norm(self.tensor(f"{name}.weight"), self._config.norm_eps)

    def block(self, index: int, place: int) -> Block:
        """Layer `index` of the model, the `place`-th of its stage."""
        config, names = self._config, block_tensors(self._config, index)
        q_norm, k_norm = (self.norm(names[n][0]) if n in names else None for n in ("q_norm", "k_norm"))
        return Block(
            config,
            place,
            config.windows[index],
            self.norm(names["input_norm"][0]),
            self.linear(names["qkv"], config.qkv_bias),
            q_norm,
            k_norm,
            self.linear(names["output"], config.output_bias),
            self.norm(names["post_norm"][0]),
            self.linear(names["gate_up"], config.mlp_bias),
            self.linear(names["down"], config.mlp_bias),
        )

    def head(self, embedding: Tensor | None) -> Project:
        """`lm_head`, which is the embedding where the two are tied; `embedding` if this stage holds it already."""
        if f"{HEAD}.weight" in self._names and not self._config.tied:
            return self.linear([HEAD])
        return Linear(self.tensor(f"{EMBED}.weight") if embedding is None else embedding)

    def _stacked(self, names: Sequence[str]) -> Tensor:
        if len(names) == 1:
            return self.tensor(names[0])
        return torch.cat([self.tensor(name) for name in names])
