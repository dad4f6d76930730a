"""Where weights come from: fp16 variants, files given in place of a component, LoRA, names and mirrors of versions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cake_core.errors import CheckpointError, ConfigError, UnsupportedModel
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.model import LoadOptions
from cake_core.requests import ImageRequest
from cake_sd import hub
from cake_sd.backend import SdBackend
from cake_sd.loading import dtype_argument
from cake_sd.versions import MIRRORS, VERSIONS

REQUEST = ImageRequest("a red apple", width=64, height=48, steps=3, seed=7)
CALL: dict[str, Any] = {"prompt": "a red apple", "width": 64, "height": 48, "num_inference_steps": 3}


def _with_fp16(source: Path, target: Path) -> Path:
    """A folder with both variants, whose fp16 files hold other values, so that one sees which were read."""
    shutil.copytree(source, target)
    for file in target.rglob("*.safetensors"):
        halves = {name: (value * 0.5).half() if value.is_floating_point() else value for name, value in load_file(file).items()}
        save_file(halves, file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")), {"format": "pt"})
    return target


def test_the_fp16_variant_is_read_when_asked_for_or_alone(kit: Any, model: Any, cluster: Any, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    folder = _with_fp16(model("sd15"), tmp_path / "both")
    wanted = {"variant": "fp16", "local_files_only": True, **dtype_argument(DiffusionPipeline, torch.float32)}
    halved = DiffusionPipeline.from_pretrained(str(folder), **wanted)
    halved.set_progress_bar_config(disable=True)
    full, fp16 = kit.pictures(kit.plain(folder), 7, **CALL), kit.pictures(halved, 7, **CALL)
    assert full != fp16
    assert cluster(folder).paint(REQUEST) == full
    assert cluster(folder, use_f16=True).paint(REQUEST) == fp16
    for file in folder.rglob("*.safetensors"):
        if ".fp16." not in file.name:
            file.unlink()
    assert cluster(folder).paint(REQUEST) == fp16


@pytest.mark.parametrize(("layer", "folder"), [("unet", "unet"), ("clip", "text_encoder"), ("vae", "vae")])
def test_a_file_may_stand_in_for_a_component(
    kit: Any, model: Any, cluster: Any, tmp_path: Path, layer: str, folder: str
) -> None:
    other = _with_fp16(model("sd15"), tmp_path / "both")
    file = next(path for path in (other / folder).glob("*.fp16.safetensors"))
    mixed = Path(shutil.copytree(model("sd15"), tmp_path / "mixed"))
    (own,) = (mixed / folder).glob("*.safetensors")
    shutil.copy(file, own)
    expected = kit.pictures(kit.plain(mixed), 7, **CALL)
    assert cluster(model("sd15"), **{layer: str(file)}).paint(REQUEST) == expected


def test_a_tokenizer_may_be_given(model: Any, cluster: Any) -> None:
    expected = cluster(model("sd15")).paint(REQUEST)
    for path in (model("sd15") / "tokenizer", model("sd15") / "tokenizer/tokenizer.json"):
        assert cluster(model("sd15"), tokenizer=str(path)).paint(REQUEST) == expected
    with pytest.raises(ConfigError, match="the model has no tokenizer_2"):
        cluster(model("sd15"), tokenizer_2=str(model("sd15") / "tokenizer"))


def _lora(kit: Any, folder: Path, target: Path, text: bool = True) -> Path:
    """A LoRA with random weights for attention of unet and text encoder, saved as diffusers saves it."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = kit.plain(folder)
    torch.manual_seed(5)
    layers = {}
    parts = [("unet", pipeline.unet, ["to_q", "to_v"])]
    parts += [("text_encoder", pipeline.text_encoder, ["q_proj", "v_proj"])] if text else []
    for name, module, targets in parts:
        module.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(module)
    StableDiffusionPipeline.save_lora_weights(str(target.parent), weight_name=target.name, **layers)
    return target


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_lora_acts_as_in_diffusers(kit: Any, model: Any, cluster: Any, tmp_path: Path, scale: float) -> None:
    pytest.importorskip("peft")
    folder = model("sd15")
    file = _lora(kit, folder, tmp_path / "style.safetensors")
    pipeline = kit.plain(folder)
    plain = kit.pictures(pipeline, 7, **CALL)
    pipeline.load_lora_weights(str(file), adapter_name="style")
    pipeline.set_adapters(["style"], [scale])
    expected = kit.pictures(pipeline, 7, **CALL)
    assert expected != plain
    for remote in ((), ("clip", "unet")):
        assert cluster(folder, remote, lora=(f"{file}={scale}",)).paint(REQUEST) == expected


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_lora_is_never_ignored(kit: Any, model: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder, backend = model("sd15"), SdBackend()
    checkpoint = DiffusersCheckpoint(folder)
    file = _lora(kit, folder, tmp_path / "style.safetensors", text=False)
    bare, with_lora = LoadOptions(device="cpu"), LoadOptions(device="cpu", extra={"sd_lora": (str(file),)})
    info = backend.describe(checkpoint, bare)
    components = {layer.name: [backend.load(checkpoint, info, layer.name, bare)] for layer in info.layers}
    with pytest.raises(ConfigError, match=r"different LoRAs.*clip, unet lack one.*same --sd-lora"):
        backend.assemble(checkpoint, info, components, with_lora)
    components["unet"] = [backend.load(checkpoint, info, "unet", with_lora)]
    with pytest.raises(ConfigError, match=r"different LoRAs.*clip lack one"):
        backend.assemble(checkpoint, info, components, bare)
    broken = tmp_path / "broken.safetensors"
    save_file({"unet.nowhere.lora_A.weight": torch.zeros(2, 2)}, broken)
    with pytest.raises(CheckpointError, match="cannot be loaded into"):
        backend.load(checkpoint, info, "unet", LoadOptions(device="cpu", extra={"sd_lora": (str(broken),)}))
    pixart = DiffusersCheckpoint(model("pixart"))
    with pytest.raises(UnsupportedModel, match="takes no LoRA"):
        backend.load(pixart, backend.describe(pixart, bare), "transformer", with_lora)


def test_versions_are_found_under_any_of_their_names(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    pulled: list[str] = []
    monkeypatch.setattr("cake_core.hub.pull", lambda hub_id: pulled.append(str(hub_id)))
    assert hub.resolve("some/model") is None
    assert hub.resolve("") is None
    hub.resolve("v1-5")
    hub.resolve("runwayml/stable-diffusion-v1-5")
    assert pulled == ["stable-diffusion-v1-5/stable-diffusion-v1-5"] * 2
    dead = VERSIONS["v1-5"].repositories[1]
    snapshot = tmp_path / f"models--{dead.replace('/', '--')}/snapshots/abc"
    shutil.copytree(model("sd15"), snapshot)
    for name in ("v1-5", dead):
        found = hub.resolve(name)
        assert found is not None
        assert (found.path, found.name) == (snapshot, dead)
    assert set(MIRRORS.values()).isdisjoint(MIRRORS)
