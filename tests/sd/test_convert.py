"""Single-file checkpoints: a pipeline written under the original trainers' names paints the same when it is converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from cake_core.checkpoint import SafetensorsCheckpoint
from cake_core.errors import CheckpointError, ConfigError, UnsupportedModel
from cake_core.model import LoadOptions
from cake_core.requests import ImageRequest
from cake_sd.backend import SdBackend
from cake_sd.convert import convert, is_single_file, main

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE = {
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "mid_block.attentions.0.": "mid.attn_1.",
    "mid_block.resnets.0.": "mid.block_1.", "mid_block.resnets.1.": "mid.block_2.",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _unet_prefixes(blocks: int, layers: int, with_attention: set[int]) -> dict[str, str]:
    """diffusers' prefix -> the original's, for a unet of so many blocks; `with_attention` are up blocks."""
    step = layers + 1
    names = {"time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2."}
    names |= {"conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2."}
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


def _rename(name: str, prefixes: dict[str, str]) -> str:
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


def _original(pipeline: Any) -> dict[str, torch.Tensor]:
    """The pipeline's tensors under the names, and in the shapes, of the original trainers."""
    found: dict[str, torch.Tensor] = {}
    prefixes = _unet_prefixes(2, 1, {0})
    for name, value in pipeline.unet.state_dict().items():
        found[f"model.diffusion_model.{_rename(name, prefixes)}"] = value.clone()
    for name, value in pipeline.vae.state_dict().items():
        old = _vae_name(name, 3)
        convolution = ".attn_1." in old and value.ndim == 2
        found[f"first_stage_model.{old}"] = value[:, :, None, None].clone() if convolution else value.clone()
    for name, value in pipeline.text_encoder.state_dict().items():
        full = name if name.startswith("text_model.") else f"text_model.{name}"
        found[f"cond_stage_model.transformer.{full}"] = value.clone()
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_single_file_paints_what_its_folder_paints(kit: Any, model: Any, cluster: Any, tmp_path: Path) -> None:
    folder = model("sd15")
    file = tmp_path / "single.safetensors"
    save_file(_original(kit.plain(folder)), file)
    assert is_single_file(file)
    bare = kit.weightless(folder, tmp_path / "bare")
    result = CliRunner().invoke(main, [str(file), str(tmp_path / "out"), "--config", str(bare)])
    assert result.exit_code == 0, result.output
    request = ImageRequest("a red apple", width=64, height=48, steps=3, seed=7)
    assert cluster(tmp_path / "out").paint(request) == cluster(folder).paint(request)


def test_what_cannot_be_converted_says_why(model: Any, tmp_path: Path) -> None:
    part = next((model("sd15") / "unet").glob("*.safetensors"))
    single = tmp_path / "single.safetensors"
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, single)
    with pytest.raises(CheckpointError, match="no single-file checkpoint"):
        convert(part, tmp_path / "a", str(model("sd15")))
    with pytest.raises(ConfigError, match=r"has no model_index\.json"):
        convert(single, tmp_path / "a", str(tmp_path))
    with pytest.raises(ConfigError, match="is there already"):
        convert(single, tmp_path, str(model("sd15")))
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text(json.dumps({"_class_name": "Unknown"}))
    with pytest.raises(ConfigError, match="Unknown cannot be read from a single file"):
        convert(single, tmp_path / "a", str(other))
    assert SdBackend().accepts(SafetensorsCheckpoint(single))
    assert not SdBackend().accepts(SafetensorsCheckpoint(part))
    with pytest.raises(UnsupportedModel, match=r"convert it once with `python -m cake_sd\.convert"):
        SdBackend().describe(SafetensorsCheckpoint(single), LoadOptions())
