"""Published architectures, as the configuration files of a diffusers folder: for models made up and for single files."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cake_core.formats.diffusers import MODEL_INDEX

Files = dict[str, dict[str, Any]]
"""Path in a model folder -> what the JSON file there holds."""

START, END = "<|startoftext|>", "<|endoftext|>"

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
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
_UNET = {
    "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}  # fmt: skip
_UNET_XL = {
    **_UNET, "sample_size": 128, "cross_attention_dim": 2048,
    "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20],
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
        "pipeline": "StableDiffusionPipeline", "clips": [("CLIPTextModel", _CLIP_L)], "vae": _VAE,
        "unet": {**_UNET, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "scheduler": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False},
    },
    "v2-1": {
        "pipeline": "StableDiffusionPipeline", "clips": [("CLIPTextModel", _CLIP_H)],
        "vae": {**_VAE, "sample_size": 768},
        "unet": {**_UNET, "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
                 "use_linear_projection": True, "upcast_attention": True},
        "scheduler": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "clip_sample": False,
                      "set_alpha_to_one": False},
    },
    "xl": {**_XL, "scheduler": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}},
    "turbo": {
        **_XL, "unet": {**_UNET_XL, "sample_size": 64},
        "scheduler": {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    },
}  # fmt: skip
"""Version -> what differs from the defaults of diffusers' and transformers' classes, and what diffusers' renaming of tensors
reads."""


def model_files(version: str) -> Files:
    """Model index, scheduler and component configurations of a version. Tokenizers are not JSON alone: `write_tokenizer`."""
    shape = SHAPES[version]
    files: Files = {
        "unet/config.json": {"_class_name": "UNet2DConditionModel", **shape["unet"]},
        "vae/config.json": {"_class_name": "AutoencoderKL", **shape["vae"]},
        "scheduler/scheduler_config.json": {**_BETAS, **shape["scheduler"]},
    }
    index: dict[str, Any] = {"_class_name": shape["pipeline"], "scheduler": ["diffusers", shape["scheduler"]["_class_name"]]}
    index |= {part: ["diffusers", files[f"{part}/config.json"]["_class_name"]] for part in ("unet", "vae")}
    for suffix, (clip, config) in zip(("", "_2"), shape["clips"], strict=False):
        files[f"text_encoder{suffix}/config.json"] = {"model_type": "clip_text_model", **config}
        index[f"text_encoder{suffix}"] = ["transformers", clip]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    return {**files, MODEL_INDEX: index}


def write_files(folder: Path, files: Files) -> None:
    for name, value in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=2), "utf-8")


@contextmanager
def made(folder: Path) -> Iterator[Path | None]:
    """Gives a folder to fill, which takes the name when it is whole; None when that is there already."""
    if folder.is_dir():
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        yield new
        try:
            new.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_tokenizer(folder: Path, vocab: Mapping[str, int], merges: str, pad: str) -> None:
    """A tokenizer folder in CLIP's layout. `merges` is the text of merges.txt."""
    from transformers import CLIPTokenizer

    write_files(folder, {
        "vocab.json": dict(vocab),
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": START, "eos_token": END,
            "pad_token": pad, "unk_token": END,
        },
    })  # fmt: skip
    (folder / "merges.txt").write_text(merges, "utf-8")
    CLIPTokenizer.from_pretrained(str(folder)).save_pretrained(str(folder))
