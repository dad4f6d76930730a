"""The text toy: a whole backend in plain Python whose next token depends on all tokens before it and on every layer.

Keys of config.json, each also an option in `LoadOptions.extra` (for one node):

- `recurrent`: keep nothing at `truncate`, like a model with a state that cannot go back.
- `seconds_per_position`, `seconds_per_batch`: sleep so long for each, to look like a slow machine.
- `memory`: bytes the machine pretends to have for weights and KV cache; too little is a CapacityError before loading.

and of config.json alone: `num_hidden_layers`, `context_length`. `LoadOptions.kv_tokens` limits the KV cache (default: four
contexts). Any `dtype` gives the same result, because the numbers are whole and small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from cake_core.checkpoint import Checkpoint
from cake_core.errors import CapacityError, CheckpointError, ConfigError
from cake_core.model import BACKEND_API, Layer, LoadOptions, ModelInfo, Progress
from cake_core.testing.toy_checkpoint import HIDDEN, TEXT_TYPE, VOCABULARY, check_shapes
from cake_core.testing.toy_layers import load_embedding, load_head, load_mixer, load_norm
from cake_core.testing.toy_stage import ToySettings, ToyStage, ToyWeights
from cake_core.testing.toy_tokenizer import ToyTokenizer

KV_BLOCK = 16


class ToyTextBackend:
    api: ClassVar[int] = BACKEND_API
    name = "toy"
    model_type: Literal["text", "image"] = "text"
    streams: ClassVar[Literal[True]] = True

    def accepts(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.config.get("model_type") == TEXT_TYPE

    def describe(self, checkpoint: Checkpoint, options: LoadOptions) -> ModelInfo:
        if options.quantize not in (None, "none"):
            raise ConfigError("toy weights cannot be quantised; leave --quantize out")
        count = _whole(checkpoint, "num_hidden_layers")
        context = _whole(checkpoint, "context_length")
        tensors: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
            "model.embed_tokens": {"weight": ("U8", (VOCABULARY, HIDDEN))},
            **{f"model.layers.{index}": {"weight": ("U8", (4, HIDDEN))} for index in range(count)},
            "model.norm": {"weight": ("U8", (2, HIDDEN))},
            "lm_head": {"weight": ("U16", (VOCABULARY, 2)), "bias": ("F32", (VOCABULARY,))},
        }
        for layer, parts in tensors.items():
            check_shapes(checkpoint, {f"{layer}.{part}": shape for part, shape in parts.items()})
        return ModelInfo(
            backend=self.name,
            model_type="text",
            name=checkpoint.name,
            architecture="ToyForCausalLM",
            layers=tuple(_layer(checkpoint, name, tuple(parts)) for name, parts in tensors.items()),
            hidden_bytes_per_token=4 * HIDDEN,
            vocab_size=VOCABULARY,
            context_length=min(options.context or context, context),
            kv_block=KV_BLOCK,
            identity={"num_hidden_layers": count, "recurrent": bool(checkpoint.config.get("recurrent", False))},
        )

    def load(
        self,
        checkpoint: Checkpoint,
        info: ModelInfo,
        layers: Sequence[str],
        options: LoadOptions,
        progress: Progress | None = None,
    ) -> ToyStage:
        names, chosen = [layer.name for layer in info.layers], tuple(layers)
        start = names.index(chosen[0]) if chosen and chosen[0] in names else 0
        if not chosen or tuple(names[start : start + len(chosen)]) != chosen:
            raise ConfigError(f"{', '.join(chosen) or 'nothing'} is no contiguous run of {checkpoint.name}'s layers")
        settings = _settings(checkpoint, info, options)
        nbytes = sum(info.layer(name).nbytes for name in chosen)
        _check_memory(checkpoint, info, chosen, options, settings.kv_tokens)
        weights = ToyWeights(
            load_embedding(checkpoint) if "model.embed_tokens" in chosen else None,
            [load_mixer(checkpoint, name) for name in chosen if name.startswith("model.layers.")],
            load_norm(checkpoint) if "model.norm" in chosen else None,
            load_head(checkpoint) if "lm_head" in chosen else None,
        )
        if progress is not None:
            progress(nbytes, nbytes)
        return ToyStage(chosen, weights, settings, nbytes)

    def tokenizer(self, checkpoint: Checkpoint) -> ToyTokenizer:
        return ToyTokenizer()


def _whole(checkpoint: Checkpoint, key: str) -> int:
    value = checkpoint.config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{checkpoint.path}: {key} in config.json must be a whole number from 1, not {value!r}")
    return value


def _layer(checkpoint: Checkpoint, name: str, parts: tuple[str, ...]) -> Layer:
    tensors = tuple(f"{name}.{part}" for part in parts)
    nbytes = sum(checkpoint.headers[tensor].nbytes for tensor in tensors)
    mixing = name.startswith("model.layers.")
    return Layer(
        name,
        nbytes,
        tensors,
        file_nbytes=nbytes,
        kv_bytes_per_token=HIDDEN if mixing else 0,
        weights_read_per_token=0 if name == "model.embed_tokens" else nbytes,
        flops_per_token=2 * nbytes,
    )


def _option(checkpoint: Checkpoint, options: LoadOptions, key: str, default: Any) -> Any:
    return options.extra.get(key, checkpoint.config.get(key, default))


def _settings(checkpoint: Checkpoint, info: ModelInfo, options: LoadOptions) -> ToySettings:
    asked = options.kv_tokens or 4 * info.context_length
    return ToySettings(
        context=info.context_length,
        kv_tokens=max(asked // info.kv_block, 1) * info.kv_block,
        kv_block=info.kv_block,
        recurrent=bool(_option(checkpoint, options, "recurrent", False)),
        seconds_per_position=float(_option(checkpoint, options, "seconds_per_position", 0)),
        seconds_per_batch=float(_option(checkpoint, options, "seconds_per_batch", 0)),
    )


def _check_memory(
    checkpoint: Checkpoint, info: ModelInfo, layers: tuple[str, ...], options: LoadOptions, kv_tokens: int
) -> None:
    memory = _option(checkpoint, options, "memory", None)
    needed = [info.layer(name).nbytes + kv_tokens * info.layer(name).kv_bytes_per_token for name in layers]
    if memory is not None and sum(needed) > memory:
        fitting = next(count for count in range(len(needed), -1, -1) if sum(needed[:count]) <= memory)
        raise CapacityError(
            f"{len(layers)} layers need {sum(needed)} bytes, there are {memory}; {fitting} of them would fit, "
            "move the others to another node"
        )
