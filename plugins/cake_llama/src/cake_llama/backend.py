"""The text backend of the Llama family. Describing needs no torch; it is imported when a stage is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from cake_core.checkpoint import Checkpoint
from cake_core.errors import ConfigError
from cake_core.model import BACKEND_API, Layer, LoadOptions, ModelInfo, Progress, TextStage, Tokenizer
from cake_llama.config import FAMILIES, ModelConfig, architecture_of
from cake_llama.names import EMBED, HEAD, NORM, block_name, hf_names, layer_of
from cake_llama.random_model import RandomCheckpoint, RandomTokenizer
from cake_llama.shapes import check_shapes

ITEM = {"f32": 4, "f16": 2, "bf16": 2}


class LlamaBackend:
    """Llama 2 to 3.2, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3, Phi-3 and Phi-4, as safetensors and GGUF."""

    api: ClassVar[int] = BACKEND_API
    name = "llama"
    model_type: Literal["text", "image"] = "text"

    def accepts(self, checkpoint: Checkpoint) -> bool:
        if checkpoint.format == "gguf":
            from cake_llama.gguf_config import ARCHITECTURES

            return checkpoint.config.get("general.architecture") in ARCHITECTURES
        return checkpoint.format == "safetensors" and architecture_of(checkpoint.config) in FAMILIES

    def describe(self, checkpoint: Checkpoint, options: LoadOptions) -> ModelInfo:
        config = ModelConfig.from_checkpoint(checkpoint)
        dtype = options.dtype if options.dtype != "auto" else config.dtype
        check_shapes(checkpoint, config)
        names = self._tensors(checkpoint, config)
        context = options.context or config.context_length
        if context > config.context_length:
            raise ConfigError(f"--context {context} is more than the {config.context_length} that {checkpoint.name} can do")
        return ModelInfo(
            backend=self.name,
            model_type="text",
            name=checkpoint.name,
            architecture=config.architecture,
            layers=tuple(_layer(checkpoint, config, name, tensors, ITEM[dtype]) for name, tensors in names.items()),
            dtype=dtype,
            hidden_bytes_per_token=config.hidden_size * ITEM[dtype],
            vocab_size=config.vocab_size,
            context_length=context,
            kv_block=16,
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

    def tokenizer(self, checkpoint: Checkpoint) -> Tokenizer:
        if isinstance(checkpoint, RandomCheckpoint):
            return RandomTokenizer(int(checkpoint.config["vocab_size"]))
        from cake_llama.tokenizer import load_tokenizer

        return load_tokenizer(checkpoint)

    def probe(self, options: LoadOptions) -> Mapping[str, float]:
        """`memory_bandwidth` (bytes/s) and `matmul` (operations/s) of the device, measured in about two seconds."""
        from cake_llama.probe import probe

        return probe(options)

    def _tensors(self, checkpoint: Checkpoint, config: ModelConfig) -> Mapping[str, list[str]]:
        """Names in the checkpoint of each layer's tensors, layers in order."""
        found: dict[str, list[str]] = {EMBED: [], **{block_name(i): [] for i in range(config.num_layers)}, NORM: [], HEAD: []}
        for hf_name, name in hf_names(checkpoint).items():
            layer = layer_of(hf_name)
            if layer in found:
                found[layer].append(name)
        if config.tied or not found[HEAD]:
            found[HEAD] = list(found[EMBED])
        return found


def _layer(checkpoint: Checkpoint, config: ModelConfig, name: str, tensors: list[str], item: int) -> Layer:
    infos = [checkpoint.headers[tensor] for tensor in tensors]
    parameters = sum(_count(info.shape) for info in infos) or _expected_parameters(config, name)
    block = name.startswith("model.layers.")
    return Layer(
        name=name,
        nbytes=parameters * item,
        tensors=tuple(tensors),
        file_nbytes=sum(info.nbytes for info in infos),
        kv_bytes_per_token=2 * config.num_kv_heads * config.head_dim * item if block else 0,
        weights_read_per_token=0 if name == EMBED else parameters * item,
        flops_per_token=0 if name == EMBED else 2 * parameters,
    )


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for dimension in shape:
        count *= dimension
    return count


def _expected_parameters(config: ModelConfig, name: str) -> int:
    """Parameters of a layer whose tensors are not in this checkpoint: in a bundle that holds other layers."""
    hidden = config.hidden_size
    if name in (EMBED, HEAD):
        return config.vocab_size * hidden
    if name == NORM:
        return hidden
    attention = hidden * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    return attention + 3 * hidden * config.intermediate_size + 2 * hidden


def _identity(config: ModelConfig) -> dict[str, Any]:
    """What has to agree between nodes for their layers to fit together."""
    return {
        "architecture": config.architecture,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "heads": [config.num_heads, config.num_kv_heads, config.head_dim],
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "windows": [window or 0 for window in config.windows],
        "rope": [config.rope.theta, config.rope.dim, config.rope.kind, config.rope.original_length],
    }
