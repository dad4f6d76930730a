"""GGUF metadata in the words of a Hugging Face config.json, so that the model has one configuration to understand."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cake_core.errors import CheckpointError, UnsupportedModel

if TYPE_CHECKING:
    from cake_core.checkpoint import Checkpoint, TensorInfo

ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
"""What `general.architecture` may be, and the Hugging Face class it stands for (Mistral files call themselves llama)."""


def hf_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json as the model's own repository would have it.

    Raises UnsupportedModel for another architecture or a switch of it that is not served, CheckpointError for a value that
    is missing or makes no sense.
    """
    architecture = checkpoint.config.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{checkpoint.path} is of GGUF architecture {architecture!r}; served are {', '.join(ARCHITECTURES)}"
        )
    return _Reader(checkpoint, architecture).config()


class _Reader:
    """Takes values of one file's architecture, checked."""

    def __init__(self, checkpoint: Checkpoint, architecture: str) -> None:
        self.checkpoint, self.architecture = checkpoint, architecture
        self.headers = checkpoint.headers

    def config(self) -> dict[str, Any]:
        if self.value("expert_count", 0):
            raise UnsupportedModel(f"{self.checkpoint.path} is a mixture of experts, which is not served; use a dense model")
        hidden, heads = self.count("embedding_length"), self.count("attention.head_count")
        head_dim = self.count("attention.key_length", hidden // heads)
        self._check_value_length(head_dim)
        rotary = self.count("rope.dimension_count", head_dim)
        return {
            "architectures": [ARCHITECTURES[self.architecture]],
            "model_type": self.architecture,
            "hidden_size": hidden,
            "intermediate_size": self.count("feed_forward_length"),
            "num_hidden_layers": self.count("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.count("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "vocab_size": self.tensor("token_embd.weight", 2).shape[0],
            "max_position_embeddings": self.count("context_length"),
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon", 1e-5),
            "rope_theta": self.number("rope.freq_base", 10000.0),
            "rope_scaling": self.rope_scaling(),
            "original_max_position_embeddings": self.optional_count("rope.scaling.original_context_length"),
            "partial_rotary_factor": rotary / head_dim,
            "sliding_window": self.optional_count("attention.sliding_window"),
            "use_sliding_window": bool(self.optional_count("attention.sliding_window")),
            "attention_bias": "blk.0.attn_q.bias" in self.headers,
            "attention_out_bias": "blk.0.attn_output.bias" in self.headers,
            "mlp_bias": "blk.0.ffn_up.bias" in self.headers,
            "hidden_act": "silu",
            "dtype": self.dtype(),
            "tie_word_embeddings": "output.weight" not in self.headers,
            "bos_token_id": self.checkpoint.config.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.checkpoint.config.get("tokenizer.ggml.eos_token_id"),
        }

    def dtype(self) -> str:
        """The width that loses nothing of note: scales of quantised blocks are f16."""
        types = {tensor.dtype for tensor in self.headers.values()}
        return "bfloat16" if "BF16" in types else "float32" if types == {"F32"} else "float16"

    def rope_scaling(self) -> dict[str, Any] | None:
        """Linear and YaRN by their metadata; Llama 3 and longrope by the factors that the file holds as tensors.

        `rope_freqs` divides every frequency by a factor whatever the length: that is longrope with one list for both.
        """
        tensors = self.checkpoint.tensors
        attention = self.number("rope.scaling.attn_factor", 1.0)
        original = self.optional_count("rope.scaling.original_context_length") or self.count("context_length")
        if "rope_freqs.weight" in tensors:
            factors = self.floats("rope_freqs.weight")
            return self._longrope(factors, factors, 1.0, original)
        if "rope_factors_long.weight" in tensors:
            short, long = self.floats("rope_factors_short.weight"), self.floats("rope_factors_long.weight")
            return self._longrope(short, long, attention, original)
        kind = self.value("rope.scaling.type", "linear" if self.value("rope.scale_linear") else "none")
        if kind == "none":
            return None
        factor = self.number("rope.scaling.factor", self.number("rope.scale_linear", 1.0))
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            return self._yarn(factor, original)
        raise UnsupportedModel(
            f"{self.checkpoint.path} scales positions by {kind!r}; served are linear, yarn, longrope and llama3"
        )

    def _longrope(self, short: list[float], long: list[float], attention: float, original: int) -> dict[str, Any]:
        return {
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "attention_factor": attention,
            "original_max_position_embeddings": original,
        }

    def _yarn(self, factor: float, original: int) -> dict[str, Any]:
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": self.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": self.number("rope.scaling.yarn_beta_slow", 1.0),
        }

    def _check_value_length(self, head_dim: int) -> None:
        if self.count("attention.value_length", head_dim) != head_dim:
            raise UnsupportedModel(f"{self.checkpoint.path} has keys and values of different length, which is not served")

    def value(self, key: str, default: Any = None) -> Any:
        return self.checkpoint.config.get(f"{self.architecture}.{key}", default)

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number above 0. A list of one for each layer is taken where all are the same."""
        found = self.value(key, default)
        if hasattr(found, "__iter__") and not isinstance(found, str):
            each = set(found)
            if len(each) != 1:
                raise UnsupportedModel(f"{self.checkpoint.path}: {key} differs from layer to layer, which is not served")
            found = each.pop()
        if type(found) is not int or found < 1:
            raise self._bad(key, found)
        return found

    def optional_count(self, key: str) -> int | None:
        """As `count`; None where the key is missing or 0."""
        return self.count(key) if self.value(key) else None

    def number(self, key: str, default: float) -> float:
        found = self.value(key, default)
        if type(found) not in (int, float) or not 0 < found < float("inf"):
            raise self._bad(key, found)
        return float(found)

    def _bad(self, key: str, found: object) -> CheckpointError:
        return CheckpointError(f"{self.checkpoint.path}: {self.architecture}.{key} is {found!r}; download the file again")

    def tensor(self, name: str, dimensions: int) -> TensorInfo:
        found = self.headers.get(name)
        if found is None or len(found.shape) != dimensions:
            raise CheckpointError(f"{self.checkpoint.path} has no tensor {name} of {dimensions} dimensions; download it again")
        return found

    def floats(self, name: str) -> list[float]:
        """The values of a small F32 tensor."""
        tensor = self.checkpoint.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.checkpoint.path} has no tensor {name}; split or download the model again")
        if tensor.dtype != "F32" or len(tensor.shape) != 1 or tensor.nbytes > 1 << 16:
            raise CheckpointError(f"{tensor.file}: {name} is {tensor.dtype}{list(tensor.shape)}, not a short list of F32")
        data = bytearray(tensor.nbytes)
        self.checkpoint.read_into(tensor, 0, memoryview(data))
        return list(struct.unpack(f"<{tensor.shape[0]}f", data))
