"""The one configuration of every decoder of the Llama family, read from config.json or GGUF metadata. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cake_core.checkpoint import Checkpoint
from cake_core.errors import CheckpointError, UnsupportedModel

KV_BLOCK = 16
"""Positions a block of the KV cache."""


@dataclass(frozen=True, slots=True)
class Family:
    """What an architecture's code does without being told by its config."""

    attention_bias: bool | None = None
    """Biases on q, k and v; None: as `attention_bias` says (then o has one too)."""
    qk_norm: bool = False
    fused: bool = False
    """q, k and v in one tensor, gate and up in another (Phi-3)."""
    windows: str = "none"
    """`all`: `sliding_window` holds for every layer; `late`: for those from `max_window_layers`, if `use_sliding_window`."""


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(attention_bias=False, windows="all"),
    "Qwen2ForCausalLM": Family(attention_bias=True, windows="late"),
    "Qwen3ForCausalLM": Family(qk_norm=True, windows="late"),
    "Phi3ForCausalLM": Family(attention_bias=False, fused=True, windows="all"),
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: base, how many dimensions of a head turn, and the scaling with its own parameters."""

    theta: float
    dim: int
    kind: str
    parameters: Mapping[str, Any]
    context_length: int

    @property
    def original_length(self) -> int:
        """Positions the model was trained for before its context was extended."""
        return int(self.parameters.get("original_max_position_embeddings") or self.context_length)

    @property
    def longest(self) -> int:
        """Positions that the scaling makes usable. `max_position_embeddings` counts them already but where the scaling was
        added to a finished model, as linear, dynamic and yarn are."""
        if self.kind in ("linear", "dynamic"):
            return int(self.context_length * self.factor)
        return max(self.context_length, int(self.original_length * self.factor)) if self.kind == "yarn" else self.context_length

    @property
    def factor(self) -> float:
        """How much longer than trained; where the config does not say, it follows from the two lengths."""
        return float(self.parameters.get("factor") or self.context_length / self.original_length)

    @property
    def depends_on_length(self) -> bool:
        """Whether a position's angle depends on how long the sequence is."""
        return self.kind in ("dynamic", "longrope")


ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    context_length: int
    rope: RopeConfig
    windows: tuple[int | None, ...]
    """For each layer the positions it attends to, itself included; None for all."""
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    fused: bool
    tied: bool
    dtype: str
    """What the weights were saved in: f32, f16 or bf16."""

    @property
    def window(self) -> int | None:
        """The largest number of past positions any layer needs, None when one needs all."""
        return None if None in self.windows else max((w for w in self.windows if w), default=None)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> ModelConfig:
        """Raises UnsupportedModel for an architecture or a switch that is not served, CheckpointError for nonsense."""
        if checkpoint.format == "gguf":
            from cake_llama.gguf_config import hf_config

            return _Reader(checkpoint, hf_config(checkpoint)).config()
        return _Reader(checkpoint, checkpoint.config).config()


def architecture_of(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


class _Reader:
    """Takes values of one config, checked."""

    def __init__(self, checkpoint: Checkpoint, values: Mapping[str, Any]) -> None:
        self._path = checkpoint.path
        self._values = values

    def config(self) -> ModelConfig:
        architecture = architecture_of(self._values)
        family = FAMILIES.get(architecture)
        if family is None:
            served = ", ".join(name.removesuffix("ForCausalLM") for name in FAMILIES)
            raise UnsupportedModel(f"{self._path} is a {architecture or 'nameless model'}; served are {served}")
        if self._values.get("hidden_act", "silu") not in ("silu", "swish"):
            raise UnsupportedModel(f"{self._path} uses the activation {self._values['hidden_act']!r}; only silu is served")
        hidden, heads = self.count("hidden_size"), self.count("num_attention_heads")
        head_dim = self.count("head_dim", hidden // heads)
        layers = self.count("num_hidden_layers")
        bias, rope = self.flag("attention_bias"), self.rope(head_dim)
        return ModelConfig(
            architecture=architecture,
            vocab_size=self.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.count("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=self.count("num_key_value_heads", heads),
            head_dim=head_dim,
            norm_eps=self.number("rms_norm_eps", 1e-6),
            context_length=rope.longest,
            rope=rope,
            windows=self.windows(family, layers),
            qkv_bias=bias if family.attention_bias is None else family.attention_bias,
            output_bias=self.flag("attention_out_bias", bias) if family.attention_bias is None else False,
            mlp_bias=self.flag("mlp_bias"),
            qk_norm=family.qk_norm,
            fused=family.fused,
            tied=self.flag("tie_word_embeddings"),
            dtype=self.dtype(),
        )

    def rope(self, head_dim: int) -> RopeConfig:
        """transformers 5 writes all of it as `rope_parameters`, older ones `rope_theta` and `rope_scaling`."""
        found = self._values.get("rope_parameters") or self._values.get("rope_scaling") or {}
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{self._path}: rope_scaling is not a map; download config.json again")
        parameters = dict(found)
        kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
        kind = {"su": "longrope", "mrope": "default"}.get(kind, kind)
        if kind not in ROPE_KINDS:
            raise UnsupportedModel(f"{self._path} scales positions by {kind!r}; served are {', '.join(ROPE_KINDS)}")
        original = self._values.get("original_max_position_embeddings")
        if original:  # beside the scaling it counts for more than within
            parameters["original_max_position_embeddings"] = original
        theta = parameters.get("rope_theta") or self.number("rope_theta", 10000.0)
        share = parameters.get("partial_rotary_factor") or self.number("partial_rotary_factor", 1.0)
        return RopeConfig(float(theta), int(head_dim * share), kind, parameters, self.count("max_position_embeddings"))

    def windows(self, family: Family, layers: int) -> tuple[int | None, ...]:
        window = self._values.get("sliding_window")
        if window is not None and (type(window) is not int or window < 1):
            raise CheckpointError(f"{self._path}: sliding_window is {window!r}; download config.json again")
        if window is None or family.windows == "none":
            return (None,) * layers
        if family.windows == "all":
            return (window,) * layers
        if not self.flag("use_sliding_window"):
            return (None,) * layers
        kinds = self._values.get("layer_types")
        if isinstance(kinds, list) and len(kinds) == layers:
            return tuple(window if kind == "sliding_attention" else None for kind in kinds)
        first = self.count("max_window_layers", layers)
        return tuple(window if index >= first else None for index in range(layers))

    def dtype(self) -> str:
        name = str(self._values.get("dtype") or self._values.get("torch_dtype") or "")
        return {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}.get(name.removeprefix("torch."), "f32")

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self._values.get(key, default))

    def count(self, key: str, default: int | None = None) -> int:
        found = self._values.get(key)
        found = default if found is None else found
        if type(found) is not int or found < 1:
            raise CheckpointError(f"{self._path}: {key} is {found!r}, not a positive number; download config.json again")
        return found

    def number(self, key: str, default: float) -> float:
        found = self._values.get(key)
        found = default if found is None else found
        if type(found) not in (int, float) or not 0 < found < float("inf"):
            raise CheckpointError(f"{self._path}: {key} is {found!r}, not a positive number; download config.json again")
        return float(found)
