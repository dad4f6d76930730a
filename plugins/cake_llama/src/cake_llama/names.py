"""The names of weights: which layer each belongs to, in Hugging Face's words and in the checkpoint's own. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cake_core.checkpoint import Checkpoint

EMBED, NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"

_BLOCK = re.compile(r"^(model\.layers\.\d+)\.")


def block_name(index: int) -> str:
    return f"model.layers.{index}"


def layer_of(hf_name: str) -> str | None:
    """The layer a tensor belongs to; None for one that no layer needs (tables that some exports carry along)."""
    if hf_name.endswith("rotary_emb.inv_freq"):
        return None
    if match := _BLOCK.match(hf_name):
        return match[1]
    for layer in (EMBED, NORM, HEAD):
        if hf_name.startswith(f"{layer}."):
            return layer
    return None


def hf_names(checkpoint: Checkpoint) -> Mapping[str, str]:
    """The checkpoint's names by Hugging Face name."""
    if checkpoint.format == "gguf":
        from cake_llama.gguf_names import hf_name

        architecture = str(checkpoint.config.get("general.architecture"))
        named = ((hf_name(name, architecture), name) for name in checkpoint.headers)
        return {hf: name for hf, name in named if hf is not None}
    return {name: name for name in checkpoint.headers}
