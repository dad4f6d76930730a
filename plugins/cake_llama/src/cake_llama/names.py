"""The names of weights: one table of what each layer is made of, in Hugging Face's words. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from cake_core.checkpoint import Checkpoint, TensorInfo
from cake_core.errors import CheckpointError
from cake_llama.config import ModelConfig
from cake_llama.hf_quant import Finder, Shape, Stored, scheme_of

EMBED, NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"

Parts = Mapping[str, tuple[str, ...]]
"""Names of a block's weights by our part of it, without `.weight`; several are stacked, in this order."""


def block_name(index: int) -> str:
    return f"model.layers.{index}"


def layer_names(config: ModelConfig) -> tuple[str, ...]:
    """All layers, in the order of execution."""
    return (EMBED, *map(block_name, range(config.num_layers)), NORM, HEAD)


def block_parts(config: ModelConfig, index: int) -> Parts:
    prefix = f"{block_name(index)}."
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    names: dict[str, tuple[str, ...]] = {
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


def layer_weights(config: ModelConfig, layer: str) -> dict[str, Shape]:
    """Every tensor of a layer, by Hugging Face name, and its shape. A tied head is the embedding's tensor."""
    table = (config.vocab_size, config.hidden_size)
    if layer == EMBED or (layer == HEAD and config.tied):
        return {f"{EMBED}.weight": table}
    if layer == HEAD:
        return {f"{HEAD}.weight": table}
    if layer == NORM:
        return {f"{NORM}.weight": (config.hidden_size,)}
    return _block_weights(config, int(layer.rsplit(".", 1)[1]))


def _block_weights(config: ModelConfig, index: int) -> dict[str, Shape]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows = {
        "qkv": (q + 2 * kv,) if config.fused else (q, kv, kv),
        "output": (hidden,),
        "gate_up": (2 * inner,) if config.fused else (inner, inner),
        "down": (hidden,),
    }
    columns = {"qkv": hidden, "output": q, "gate_up": hidden, "down": inner}
    biased = {"qkv": config.qkv_bias, "output": config.output_bias, "gate_up": config.mlp_bias, "down": config.mlp_bias}
    norms = {"input_norm": hidden, "post_norm": hidden, "q_norm": config.head_dim, "k_norm": config.head_dim}
    found: dict[str, Shape] = {}
    for part, names in block_parts(config, index).items():
        if part in norms:
            found[f"{names[0]}.weight"] = (norms[part],)
            continue
        for name, count in zip(names, rows[part], strict=True):
            found[f"{name}.weight"] = (count, columns[part])
            if biased[part]:
                found[f"{name}.bias"] = (count,)
    return found


def layer_tensors(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, list[Stored]]:
    """Each layer's weights, layers in the order of execution.

    Raises CheckpointError for a tensor that is missing or of another shape than the configuration says, UnsupportedModel for a
    quantisation that is not served.
    """
    own_names, scheme = own_names_of(checkpoint), scheme_of(checkpoint)
    finder = None if scheme is None else Finder(checkpoint.path, scheme, checkpoint.headers)

    def weight(name: str, shape: Shape) -> Stored:
        quantised = None if finder is None else finder.find(name, shape)
        return quantised or Stored(name, shape, {"weight": _header(checkpoint, own_names, name, shape)})

    layers = layer_names(config)
    return {layer: [weight(*named) for named in layer_weights(config, layer).items()] for layer in layers}


def _header(checkpoint: Checkpoint, own_names: Mapping[str, str], name: str, shape: Shape) -> TensorInfo:
    if name not in own_names:
        close = difflib.get_close_matches(name, own_names, 1)
        hint = f" (the nearest there is {close[0]!r})" if close else ""
        raise CheckpointError(f"{checkpoint.path} has no tensor {name!r}{hint}; download the model again")
    found = checkpoint.headers[own_names[name]]
    if found.shape != shape:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {found.name!r} is {list(found.shape)}, the configuration says {list(shape)}; "
            "download both again, from the same model"
        )
    return found


def own_names_of(checkpoint: Checkpoint) -> Mapping[str, str]:
    """The checkpoint's names by Hugging Face name."""
    if checkpoint.format != "gguf":
        return {name: name for name in checkpoint.headers}
    from cake_llama.gguf_names import hf_name

    architecture = str(checkpoint.config.get("general.architecture"))
    named = ((hf_name(name, architecture), name) for name in checkpoint.headers)
    return {hf: name for hf, name in named if hf is not None}
