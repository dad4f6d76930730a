"""What shapes a configuration gives to each weight, and whether a checkpoint has them. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from cake_core.checkpoint import Checkpoint
from cake_core.errors import CheckpointError
from cake_llama.config import ModelConfig
from cake_llama.names import EMBED, HEAD, NORM, block_name, hf_names

Shape = tuple[int, ...]


def block_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every weight a block must have, by its name inside the block."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if config.fused:
        projections = {"self_attn.qkv_proj": (q + 2 * kv, hidden), "mlp.gate_up_proj": (2 * inner, hidden)}
    else:
        projections = {
            "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        }  # fmt: skip
    projections |= {"self_attn.o_proj": (hidden, q), "mlp.down_proj": (hidden, inner)}
    shapes: dict[str, Shape] = {f"{name}.weight": shape for name, shape in projections.items()}
    for name, shape in projections.items():
        if config.mlp_bias if name.startswith("mlp.") else config.output_bias if name.endswith("o_proj") else config.qkv_bias:
            shapes[f"{name}.bias"] = shape[:1]
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    return shapes | {f"{name}.weight": (width,) for name, width in norms.items()}


def check_shapes(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raises CheckpointError for a weight of another shape than the configuration says, or a block that lacks one.

    A block of which nothing is known is passed over: it is not in this bundle.
    """
    names = hf_names(checkpoint)
    block = block_shapes(config)
    for index in range(config.num_layers):
        expected = {f"{block_name(index)}.{name}": shape for name, shape in block.items()}
        if missing := sorted(expected.keys() - names.keys()):
            if len(missing) < len(expected):
                raise CheckpointError(f"{checkpoint.path} has no {missing[0]}; download it again, or check its configuration")
            continue
        _compare(checkpoint, names, expected)
    ends = (config.vocab_size, config.hidden_size)
    _compare(checkpoint, names, {f"{EMBED}.weight": ends, f"{HEAD}.weight": ends, f"{NORM}.weight": ends[1:]})


def _compare(checkpoint: Checkpoint, names: Mapping[str, str], expected: Mapping[str, Shape]) -> None:
    for name, shape in expected.items():
        if name not in names:
            continue
        found = checkpoint.headers[names[name]]
        if found.shape != shape:
            raise CheckpointError(
                f"{checkpoint.path}: {found.name} is {list(found.shape)}, but the configuration makes it {list(shape)}; "
                "weights and configuration are of different models"
            )
