"""Models with random weights and the shapes of real ones: `--model random:llama-3-8b`. For measuring speed and memory without
a download; what they say is noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cake_core.checkpoint import Checkpoint, TensorInfo
from cake_core.errors import CheckpointError
from cake_core.model import DecodeStream
from cake_core.requests import Message, SamplingDefaults

if TYPE_CHECKING:
    import torch

    from cake_llama.packed import Packed

PREFIX = "random:"


def llama_shape(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    """The configuration of a Llama of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        **more,
    }


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tiny": llama_shape(256, 512, 4, 8, 4, 512, max_position_embeddings=2048, torch_dtype="float32"),
    "smollm2-135m": llama_shape(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True, rope_theta=100000.0),
    "llama-3.2-1b": llama_shape(2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True, head_dim=64),
    "llama-3.2-3b": llama_shape(3072, 8192, 28, 24, 8, 128256, tie_word_embeddings=True, head_dim=128),
    "llama-3-8b": llama_shape(4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": llama_shape(8192, 28672, 80, 64, 8, 128256),
}
"""Configurations by name, as their models' repositories have them."""


class RandomCheckpoint(Checkpoint):
    """A checkpoint without files: shapes from the configuration, values from a seed."""

    format = "safetensors"

    def __init__(self, shape: str, config: Mapping[str, Any] | None = None) -> None:
        if config is None and shape not in SHAPES:
            raise CheckpointError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")
        super().__init__(Path(f"{PREFIX}{shape}"), f"{PREFIX}{shape}")
        self.shape = shape
        self._config = SHAPES[shape] if config is None else config

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        shapes = tensor_shapes(self.config)
        return {name: TensorInfo(name, "BF16", shape, self.path, 0, 2 * math.prod(shape)) for name, shape in shapes.items()}

    def source(self, device: torch.device) -> RandomWeights:
        return RandomWeights(self, device)

    def fingerprint(self, names: Any) -> str:
        """Equal names have equal values: the seed is part of the name."""
        import hashlib

        return hashlib.sha256("|".join([self.shape, *sorted(names)]).encode()).hexdigest()


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensors of a model of this configuration, of an architecture that keeps its projections apart."""
    architecture = config["architectures"][0]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (q, hidden),
            f"{prefix}self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}self_attn.v_proj.weight": (kv, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, q),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}mlp.up_proj.weight": (inner, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, inner),
        }
        if architecture == "Qwen2ForCausalLM":
            shapes |= {f"{prefix}self_attn.{x}_proj.bias": (q if x == "q" else kv,) for x in "qkv"}
        if architecture == "Qwen3ForCausalLM":
            shapes |= {f"{prefix}self_attn.{x}_norm.weight": (head_dim,) for x in "qk"}
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


class RandomWeights:
    """Normal weights scaled so that activations keep their size; norms are one. Made on the device that will hold them."""

    def __init__(self, checkpoint: RandomCheckpoint, device: torch.device) -> None:
        self._tensors = checkpoint.tensors
        self._device = device

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def kind(self, name: str) -> str:
        return "BF16"

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Packed:
        import torch

        from cake_llama.packed import stored

        return stored(self.load(name, torch.bfloat16)[start:stop])

    def load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        import zlib

        import torch

        shape = self._tensors[name].shape
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        result = torch.empty(shape, dtype=dtype, device=self._device)
        return result.normal_(0.0, shape[1] ** -0.5, generator=generator)


class RandomTokenizer:
    """Bytes as ids, and ids as words of four letters, for models that have no language."""

    bos_id: int | None = None
    has_chat_template = True
    stop_ids: frozenset[int] = frozenset()
    defaults = SamplingDefaults()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        return [byte % self.vocab_size for byte in text.encode()]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return "".join(_word(token) for token in ids)

    def stream(self, prompt: Sequence[int] = (), *, skip_special: bool = True) -> DecodeStream:
        return _Words()

    def token_bytes(self, token: int) -> bytes:
        return _word(token).encode()

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        template_options: Mapping[str, Any] | None = None,
    ) -> str:
        return "\n".join(str(message.get("content") or "") for message in messages) or " "

    def describe(self) -> Mapping[str, Any]:
        return {"tokenizer_class": "RandomTokenizer"}


class _Words:
    def step(self, token: int) -> str:
        return _word(token)

    def flush(self) -> str:
        return ""


def _word(token: int) -> str:
    letters = "etaoinshrdlu"
    return "".join(letters[token // 12**place % 12] for place in range(4)) + " "
