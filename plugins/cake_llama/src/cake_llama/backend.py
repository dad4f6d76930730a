"""The text backend of the Llama family. Describing needs no torch; it is imported when a stage is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from cake_core.checkpoint import Checkpoint
from cake_core.errors import ConfigError
from cake_core.model import BACKEND_API, DTYPE_SIZES, Layer, LoadOptions, ModelInfo, Progress, TextStage, Tokenizer
from cake_core.profiles import DeviceProfile
from cake_llama.config import FAMILIES, KV_BLOCK, ModelConfig, architecture_of
from cake_llama.hf_quant import Stored, scheme_of
from cake_llama.names import EMBED, HEAD, layer_tensors
from cake_llama.random_model import RandomCheckpoint, RandomTokenizer

QUANTIZED_BYTES = {"int8": 34, "int4": 19}
"""Bytes of 32 weights with their scale, as `--quantize` makes them; the embedding and the head stay at 8 bit."""


class LlamaBackend:
    """Llama 2 to 3.2, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3, Phi-3 and Phi-4, as safetensors and GGUF."""

    api: ClassVar[int] = BACKEND_API
    name = "llama"
    model_type: Literal["text", "image"] = "text"
    streams: ClassVar[Literal[True]] = True

    def accepts(self, checkpoint: Checkpoint) -> bool:
        if checkpoint.format == "gguf":
            from cake_llama.gguf_config import ARCHITECTURES

            return checkpoint.config.get("general.architecture") in ARCHITECTURES
        return checkpoint.format == "safetensors" and architecture_of(checkpoint.config) in FAMILIES

    def describe(self, checkpoint: Checkpoint, options: LoadOptions) -> ModelInfo:
        config = ModelConfig.from_checkpoint(checkpoint)
        dtype = options.dtype if options.dtype != "auto" else config.dtype
        item, kv_bytes = DTYPE_SIZES[dtype], _kv_bytes(config, dtype if options.kv_dtype == "auto" else options.kv_dtype)
        width = _width(checkpoint, options, item)
        context = options.context or config.context_length
        if context > config.context_length:
            raise ConfigError(f"--context {context} is more than the {config.context_length} that {checkpoint.name} can do")
        return ModelInfo(
            backend=self.name,
            model_type="text",
            name=checkpoint.name,
            architecture=config.architecture,
            layers=tuple(_layer(name, found, width, kv_bytes) for name, found in layer_tensors(checkpoint, config).items()),
            dtype=dtype,
            hidden_bytes_per_token=config.hidden_size * item,
            vocab_size=config.vocab_size,
            context_length=context,
            kv_block=KV_BLOCK,
            identity=_identity(config),
        )

    def load(
        self,
        checkpoint: Checkpoint,
        info: ModelInfo,
        layers: Sequence[str],
        options: LoadOptions,
        progress: Progress | None = None,
    ) -> TextStage:
        from cake_llama.loading import load_stage

        return load_stage(checkpoint, info, layers, options, progress)

    def warm(self) -> None:
        import cake_llama.loading  # noqa: F401 - torch and the stages come with it

    def narrow(self, checkpoint: Checkpoint, quantize: str, folder: Path, progress: Progress | None = None) -> Checkpoint:
        from cake_llama.narrow_files import write_narrowed

        return write_narrowed(checkpoint, quantize, folder, progress)

    def tokenizer(self, checkpoint: Checkpoint) -> Tokenizer:
        if isinstance(checkpoint, RandomCheckpoint):
            return RandomTokenizer(int(checkpoint.config["vocab_size"]))
        from cake_llama.tokenizer import load_tokenizer

        return load_tokenizer(checkpoint)

    def profile(self, options: LoadOptions, known: DeviceProfile | None = None) -> DeviceProfile:
        """The device of `options` as the planner needs it, measured with real stages in a few seconds."""
        from cake_llama.profile import profile

        return profile(options, known)

    def probe(self, options: LoadOptions) -> Mapping[str, float]:
        """`memory_bandwidth` (bytes/s) and `matmul` (operations/s) of the device, measured in about two seconds."""
        from cake_llama.probe import probe

        return probe(options)


def _kv_bytes(config: ModelConfig, dtype: str) -> int:
    """Of one position in one layer. In int8 every vector has a scale. Raises ConfigError for a dtype that is not served."""
    if dtype not in ("f32", "f16", "bf16", "int8"):
        raise ConfigError(f"--kv-dtype {dtype} is not served; use auto, f32, f16, bf16 or int8")
    vector = config.head_dim + 4 if dtype == "int8" else config.head_dim * DTYPE_SIZES[dtype]
    return 2 * config.num_kv_heads * vector


Width = Callable[[Stored], int]
"""Bytes that a weight takes in memory."""


def _width(checkpoint: Checkpoint, options: LoadOptions, item: int) -> Width:
    """Raises ConfigError for a width that cannot be had."""
    packed, as_is = checkpoint.format == "gguf", options.dtype == "auto"
    if options.quantize in (None, "none"):
        return lambda weight: weight.nbytes if as_is and (packed or weight.form != "plain") else math.prod(weight.shape) * item
    size = QUANTIZED_BYTES.get(str(options.quantize))
    if size is None:
        raise ConfigError(f"unknown --quantize {options.quantize}; use int8, int4 or none")
    if packed or scheme_of(checkpoint) is not None:
        raise ConfigError(f"{checkpoint.name} is quantised already, its weights stay as they are; leave --quantize out")

    def narrow(weight: Stored) -> int:
        if len(weight.shape) == 1:
            return 4 * weight.shape[0]
        whole = weight.name.startswith((EMBED, HEAD))
        return math.prod(weight.shape) * (QUANTIZED_BYTES["int8"] if whole else size) // 32

    return narrow


def _layer(name: str, weights: Sequence[Stored], width: Width, kv_bytes: int) -> Layer:
    nbytes = sum(width(weight) for weight in weights)
    return Layer(
        name=name,
        nbytes=nbytes,
        tensors=tuple(part.name for weight in weights for part in weight.parts.values()),
        file_nbytes=sum(weight.nbytes for weight in weights),
        kv_bytes_per_token=kv_bytes if name.startswith("model.layers.") else 0,
        weights_read_per_token=0 if name == EMBED else nbytes,
        flops_per_token=0 if name == EMBED else 2 * sum(math.prod(weight.shape) for weight in weights),
    )


def _identity(config: ModelConfig) -> dict[str, Any]:
    """What has to agree between nodes for their layers to fit together."""
    rope = config.rope
    return {
        "architecture": config.architecture,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_layers,
        "heads": [config.num_heads, config.num_kv_heads, config.head_dim],
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "windows": [window or 0 for window in config.windows],
        "switches": [config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm, config.tied],
        "rope": [rope.theta, rope.dim, rope.kind, rope.context_length],
        "rope_scaling": {name: rope.parameters[name] for name in sorted(rope.parameters)},
    }
