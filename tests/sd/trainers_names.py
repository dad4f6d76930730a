"""From diffusers' names of tensors back to those of the original trainers, as single-file checkpoints have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE = {
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "mid_block.attentions.0.": "mid.attn_1.",
    "mid_block.resnets.0.": "mid.block_1.", "mid_block.resnets.1.": "mid.block_2.",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn": "attn",
    "fc1": "c_fc", "fc2": "c_proj", "final_layer_norm": "ln_final", "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
}  # fmt: skip


def unet_prefixes(blocks: int, layers: int, with_attention: set[int]) -> dict[str, str]:
    """diffusers' prefix -> the original's, for a unet of so many blocks; `with_attention` are up blocks."""
    step = layers + 1
    names = {"time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2."}
    names |= {"conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2."}
    names |= {"add_embedding.linear_1.": "label_emb.0.0.", "add_embedding.linear_2.": "label_emb.0.2."}
    names |= {"mid_block.resnets.0.": "middle_block.0.", "mid_block.resnets.1.": "middle_block.2."}
    names["mid_block.attentions.0."] = "middle_block.1."
    for i in range(blocks):
        for j in range(layers):
            names[f"down_blocks.{i}.resnets.{j}."] = f"input_blocks.{step * i + j + 1}.0."
            names[f"down_blocks.{i}.attentions.{j}."] = f"input_blocks.{step * i + j + 1}.1."
        for j in range(step):
            names[f"up_blocks.{i}.resnets.{j}."] = f"output_blocks.{step * i + j}.0."
            names[f"up_blocks.{i}.attentions.{j}."] = f"output_blocks.{step * i + j}.1."
        names[f"down_blocks.{i}.downsamplers.0.conv."] = f"input_blocks.{step * (i + 1)}.0.op."
        place = 2 if i in with_attention else 1
        names[f"up_blocks.{i}.upsamplers.0."] = f"output_blocks.{step * (i + 1) - 1}.{place}."
    return names


def _rename(name: str, prefixes: Mapping[str, str]) -> str:
    found = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len)
    rest = name.removeprefix(found)
    if ".resnets." in found:
        for new, old in RESNET.items():
            rest = rest.replace(new, old)
    return prefixes[found] + rest


def _vae_name(name: str, blocks: int) -> str:
    for new, old in VAE.items():
        name = name.replace(new, old)
    for i in range(blocks):
        name = name.replace(f"down_blocks.{i}.resnets.", f"down.{i}.block.").replace(
            f"down_blocks.{i}.downsamplers.0.", f"down.{i}.downsample."
        )
        mirrored = blocks - 1 - i
        name = name.replace(f"up_blocks.{i}.resnets.", f"up.{mirrored}.block.").replace(
            f"up_blocks.{i}.upsamplers.0.", f"up.{mirrored}.upsample."
        )
    if ".attn_1." in name:
        for new, old in ATTENTION.items():
            name = name.replace(f".{new}.", f".{old}.")
    return name


def original(parts: Mapping[str, Mapping[str, torch.Tensor]], unet: Mapping[str, str], vae_blocks: int = 3) -> Tensors:
    """Components' tensors, by the folder of each, under the names and in the shapes of the original trainers."""
    found: Tensors = {}
    for name, value in parts["unet"].items():
        found[f"model.diffusion_model.{_rename(name, unet)}"] = value
    for name, value in parts["vae"].items():
        old = _vae_name(name, vae_blocks)
        convolution = ".attn_1." in old and value.ndim == 2
        found[f"first_stage_model.{old}"] = value[:, :, None, None] if convolution else value
    second, first = parts.get("text_encoder_2"), parts["text_encoder"]
    if second is None and len(first) > 300:  # the one of version 2
        return found | {f"cond_stage_model.model.{name}": value for name, value in _open_clip(first).items()}
    prefix = "cond_stage_model.transformer." if second is None else "conditioner.embedders.0.transformer."
    found |= {prefix + (n if n.startswith("text_model.") else f"text_model.{n}"): value for n, value in first.items()}
    return found | {f"conditioner.embedders.1.model.{name}": v for name, v in _open_clip(second or {}).items()}


def tiny(pipeline: Any) -> Tensors:
    """A tiny SD 1.5 or SDXL as a single file has it."""
    names = ("text_encoder", "text_encoder_2", "unet", "vae")
    parts = {n: part.state_dict() for n in names if (part := getattr(pipeline, n, None)) is not None}
    return {name: value.contiguous().clone() for name, value in original(parts, unet_prefixes(2, 1, {0})).items()}


def _open_clip(state: Mapping[str, torch.Tensor]) -> Tensors:
    """OpenCLIP's names: one projection for query, key and value, and the pooled one the other way round."""
    found: Tensors = {}
    for name, value in state.items():
        rest = name.removeprefix("text_model.")
        for new, old in OPEN_CLIP.items():
            rest = rest.replace(new, old)
        if "q_proj" in rest:
            parts = [state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            found[rest.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif rest == "text_projection.weight":
            found["text_projection"] = value.T
        elif not any(part in rest for part in ("k_proj", "v_proj", "position_ids")):
            found[rest] = value
    return found
