"""Models of real size with random weights, `random:xl`: to measure a machine or a cluster without downloading anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cake_core.checkpoint import ABSENT, TensorInfo
from cake_core.formats.diffusers import MODEL_INDEX, DiffusersCheckpoint
from cake_sd.versions import RANDOM

MARK = "random.json"
"""In a model folder: its components have no files and are made up when they are loaded."""

_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_VAE = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
           "projection_dim": 768, "hidden_act": "quick_gelu"}  # fmt: skip
_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
           "projection_dim": 512, "hidden_act": "gelu"}  # fmt: skip
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
           "projection_dim": 1280, "hidden_act": "gelu"}  # fmt: skip
_UNET_XL = {
    "sample_size": 128, "cross_attention_dim": 2048, "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "use_linear_projection": True,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10],
}  # fmt: skip
_XL: Mapping[str, Any] = {
    "pipeline": "StableDiffusionXLPipeline", "unet": _UNET_XL, "vae": {**_VAE, "scaling_factor": 0.13025, "sample_size": 1024},
    "clips": [("CLIPTextModel", _CLIP_L), ("CLIPTextModelWithProjection", _CLIP_G)],
}  # fmt: skip
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "v1-5": {
        "pipeline": "StableDiffusionPipeline", "clips": [("CLIPTextModel", _CLIP_L)], "scheduler": "DDIMScheduler", "vae": _VAE,
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    },
    "v2-1": {
        "pipeline": "StableDiffusionPipeline", "clips": [("CLIPTextModel", _CLIP_H)], "scheduler": "DDIMScheduler", "vae": _VAE,
        "unet": {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
                 "use_linear_projection": True},
    },
    "xl": {**_XL, "scheduler": "EulerDiscreteScheduler"},
    "turbo": {**_XL, "scheduler": "EulerAncestralDiscreteScheduler"},
}  # fmt: skip
"""Published architectures: what differs from the defaults of diffusers' and transformers' classes."""


class RandomCheckpoint(DiffusersCheckpoint):
    """Has headers, from the list of its absent tensors, and no tensor that could be read or compared."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {}


def resolve(reference: str, cache: Path) -> RandomCheckpoint | None:
    """The model of a `random:NAME`, its folder of configurations made in `cache` at first use; None for other references."""
    name = reference.removeprefix(RANDOM)
    if name not in SHAPES:
        return None
    folder = cache / "random" / name
    if not (folder / MARK).is_file():
        _make(name, folder)
    return RandomCheckpoint(folder, reference)


def _make(name: str, folder: Path) -> None:
    shape = SHAPES[name]
    _tokenizer(folder / "tokenizer")
    index: dict[str, Any] = {"_class_name": shape["pipeline"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    configs: dict[str, dict[str, Any]] = {"unet": {"_class_name": "UNet2DConditionModel", **shape["unet"]}}
    configs["vae"] = {"_class_name": "AutoencoderKL", **shape["vae"]}
    for number, (clip, config) in enumerate(shape["clips"], 1):
        part = "text_encoder" + (f"_{number}" if number > 1 else "")
        configs[part] = {
            "model_type": "clip_text_model",
            "eos_token_id": 513,
            "bos_token_id": 512,
            "pad_token_id": 513,
            **config,
        }
        index[part] = ["transformers", clip]
        if number > 1:
            _tokenizer(folder / f"tokenizer_{number}")
            index[f"tokenizer_{number}"] = ["transformers", "CLIPTokenizer"]
    for part, config in configs.items():
        _write(folder / part / "config.json", config)
        index.setdefault(part, ["diffusers", config.get("_class_name")])
    spacing = {"timestep_spacing": "trailing"} if name == "turbo" else {"steps_offset": 1}
    _write(folder / "scheduler/scheduler_config.json", {"_class_name": shape["scheduler"], **_BETAS, **spacing})
    index["scheduler"] = ["diffusers", shape["scheduler"]]
    _write(folder / MODEL_INDEX, index)
    _write(folder / ABSENT, _headers(DiffusersCheckpoint(folder)))
    _write(folder / MARK, {"name": name})


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


def _tokenizer(folder: Path) -> None:
    """A tokenizer in CLIP's layout that knows single bytes only."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate((*letters, *(f"{letter}</w>" for letter in letters), *_SPECIAL))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    _write(folder / "tokenizer_config.json", {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": _SPECIAL[0], "eos_token": _SPECIAL[1],
        "pad_token": _SPECIAL[1], "unk_token": _SPECIAL[1],
    })  # fmt: skip
    CLIPTokenizer.from_pretrained(str(folder)).save_pretrained(str(folder))


def _headers(checkpoint: DiffusersCheckpoint) -> dict[str, Any]:
    """Names and shapes of the tensors that the components will have, as a bundle lists those it lacks."""
    from accelerate import init_empty_weights

    from cake_sd.layout import FOLDERS, layers_of

    found: dict[str, Any] = {}
    for layer in layers_of(checkpoint):
        with init_empty_weights():
            module = build(checkpoint, layer)
        for name, value in module.state_dict().items():
            found[f"{FOLDERS[layer]}/{name}"] = ["F16", list(value.shape), 2 * value.numel()]
    return found


def build(checkpoint: DiffusersCheckpoint, layer: str) -> Any:
    """A component with whatever weights its constructor gives it, on torch's current default device."""
    from cake_sd.layout import component_config
    from cake_sd.loading import resolve_class

    real, config = resolve_class(checkpoint, layer), dict(component_config(checkpoint, layer))
    if getattr(real, "config_class", None) is not None:
        return real(real.config_class.from_dict(config))
    return real.from_config(config)
