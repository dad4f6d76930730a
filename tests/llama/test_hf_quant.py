"""GPTQ, AWQ, FP8 and compressed-tensors checkpoints: weights by the formats' own formulas, logits by transformers in f32."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.native import available
from tests.llama.quantized_rig import CONFIG, FORMS, HEADS, HIDDEN, INNER, KV_HEADS, LAYERS, VOCABULARY, fp8, write
from tests.llama.test_quant import BOUND, EXACT, TOKENS, load, logprobs
from transformers import LlamaConfig, LlamaForCausalLM

from cake_core.checkpoint import SafetensorsCheckpoint
from cake_core.errors import CheckpointError, ConfigError, UnsupportedModel
from cake_core.model import LoadOptions
from cake_core.split import split
from cake_core.topology import parse_topology
from cake_llama.backend import LlamaBackend
from cake_llama.config import ModelConfig
from cake_llama.cpu import loader
from cake_llama.names import layer_names, layer_weights
from cake_llama.weights import weight_source

BACKEND = LlamaBackend()
Made = tuple[SafetensorsCheckpoint, dict[str, torch.Tensor], torch.Tensor]


@pytest.fixture(params=["kernels", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With cake-kernels, and as where it is not installed."""
    if request.param == "torch":
        monkeypatch.setattr(loader, "has_kernels", lambda: False)
    elif not available():
        pytest.skip("cake-kernels is neither installed nor can it be built here")
    return str(request.param)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A checkpoint, its weights, and what transformers makes of TOKENS with them."""
    found: dict[str, Made] = {}

    def made(name: str) -> Made:
        if name not in found:
            folder = tmp_path_factory.mktemp(name) / "model"
            weights = write(folder, FORMS[name])
            found[name] = SafetensorsCheckpoint(folder), weights, _logits(weights)
        return found[name]

    return made


def _logits(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=64, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(weights)
    with torch.inference_mode():
        return torch.as_tensor(model(torch.tensor([TOKENS])).logits[0].log_softmax(-1))


@pytest.mark.parametrize("name", FORMS)
def test_weights_are_what_the_formula_says(made: Callable[[str], Made], name: str) -> None:
    checkpoint, weights, _ = made(name)
    source = weight_source(checkpoint)
    assert set(source.names()) == set(weights)
    for key, expected in weights.items():
        assert source.shape(key) == expected.shape
        torch.testing.assert_close(source.load(key, torch.float32), expected, rtol=2e-7, atol=1e-9)
        if expected.dim() == 2:
            piece = source.rows(key, 3, 45)
            assert piece.kind == source.kind(key)
            columns = slice(None) if piece.order is None else piece.order
            torch.testing.assert_close(piece.dequantized(), expected[3:45][:, columns], rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("name", FORMS)
def test_logits_are_those_of_the_dequantised_model(made: Callable[[str], Made], way: str, name: str) -> None:
    checkpoint, _, expected = made(name)
    stage = load(checkpoint, kv_dtype="f32")
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
    exact = way == "torch" or name.startswith("fp8")
    for chunk in (1, 40):
        error = float((logprobs(stage, TOKENS, chunk) - expected).square().mean().sqrt() / spread)
        assert error < (EXACT if exact else BOUND)
    stage.shutdown()


@pytest.mark.parametrize("name", ["gptq-4-scattered", "awq", "packed-4", "fp8-blocks"])
def test_weights_take_what_they_take_in_the_file(made: Callable[[str], Made], way: str, name: str) -> None:
    checkpoint = made(name)[0]
    info = BACKEND.describe(checkpoint, LoadOptions(device="cpu"))
    in_file = sum(t.nbytes for t in checkpoint.tensors.values())
    assert in_file == sum(layer.nbytes for layer in info.layers)
    stage = load(checkpoint)
    assert 0.95 * in_file < stage.memory().weights < 1.05 * in_file, way
    stage.shutdown()
    wide = BACKEND.describe(checkpoint, LoadOptions(device="cpu", dtype="f32"))
    assert sum(layer.nbytes for layer in wide.layers) > 2 * in_file


@pytest.mark.parametrize("name", ["gptq-4", "packed-4-asymmetric", "fp8-tensor"])
def test_a_bundle_holds_every_part_of_its_matrices(made: Callable[[str], Made], tmp_path: Path, name: str) -> None:
    checkpoint, _, expected = made(name)
    info = BACKEND.describe(checkpoint, LoadOptions())
    topology = parse_topology({"a": {"host": "h:1", "layers": [layer.name for layer in info.layers]}})
    whole, *_ = split(checkpoint, info, topology, tmp_path / "all")
    stage = load(SafetensorsCheckpoint(whole.folder / "model"), kv_dtype="f32", dtype="f32")
    found = logprobs(stage, TOKENS, 40)
    assert float((found - expected).abs().max()) < 1e-3
    topology = parse_topology({"a": {"host": "h:1", "layers": ["model.layers.1"]}})
    part, *_ = split(checkpoint, info, topology, tmp_path / "one")
    described = BACKEND.describe(SafetensorsCheckpoint(part.folder / "model"), LoadOptions())
    assert described.layers == info.layers


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, r"by 'bitsandbytes'; served are gptq .4 and 8 bit., awq"),
        ({"bits": 4}, "by 'an unnamed method'"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "by gptq in 3 bit"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "laid out as marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "by awq in 4 bit as gemv"),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {"g": {"weights": {"num_bits": 4}}}},
            "as marlin-24",
        ),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}},
            "sparsely, as sparse-bitmask",
        ),
    ],
)
def test_other_methods_are_refused_by_name(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    write(tmp_path / "model", FORMS["gptq-4"])
    (tmp_path / "model" / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": config}))
    with pytest.raises(UnsupportedModel, match=message):
        BACKEND.describe(SafetensorsCheckpoint(tmp_path / "model"), LoadOptions())


def test_what_does_not_fit_together_is_named(made: Callable[[str], Made], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is quantised already"):
        BACKEND.describe(made("awq")[0], LoadOptions(quantize="int4"))
    write(tmp_path / "model", FORMS["gptq-4"])
    config = {**CONFIG, "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight should be \[256, 256\] in groups of 64, but is .*qweight"):
        BACKEND.describe(SafetensorsCheckpoint(tmp_path / "model"), LoadOptions())


def test_groups_that_split_a_vector_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "model", fp8((96, 24)))
    with pytest.raises(UnsupportedModel, match=r"has groups of 24 columns of 256; served are multiples of 32"):
        BACKEND.describe(SafetensorsCheckpoint(tmp_path / "model"), LoadOptions())


MEASURE = """
import sys
from pathlib import Path
from cake_core.checkpoint import SafetensorsCheckpoint
from cake_core.model import Batch, LoadOptions, Row, SessionSpec, Tensor
from cake_core.requests import SamplingParams
from cake_llama.backend import LlamaBackend
from cake_llama.config import ModelConfig
from cake_llama.cpu import loader
from cake_llama.names import layer_names, layer_weights
import torch

def kilobytes(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))

torch.set_num_threads(1)
torch.ones(64, 64) @ torch.ones(64, 64)
if sys.argv[2] == "torch":
    loader.has_kernels = lambda: False
before = kilobytes("VmRSS")
checkpoint, backend = SafetensorsCheckpoint(Path(sys.argv[1])), LlamaBackend()
options = LoadOptions(device="cpu", kv_tokens=64, threads=1)
info = backend.describe(checkpoint, options)
layers = [layer.name for layer in info.layers if layer.name.startswith("model.layers.")]
stage = backend.load(checkpoint, info, layers, options)
stage.open(1, SessionSpec(SamplingParams(), 4))
hidden = Tensor("f16", (4, checkpoint.config["hidden_size"]), bytes(8 * checkpoint.config["hidden_size"]))
stage.submit(Batch((Row(1, 0, 4),), {"hidden": hidden})).result()
print((kilobytes("VmHWM") - before) * 1024, sum(info.layer(name).file_nbytes for name in layers))
"""


def _sparse_gptq(folder: Path) -> None:
    """Eight layers of a 1B shape in 4 bit: zeros, which take no room on the disk."""
    config = {**CONFIG, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 8, "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    plain = SafetensorsCheckpoint(folder)
    header, end = dict[str, Any](), 0
    for layer in layer_names(parsed := ModelConfig.from_checkpoint(plain)):
        for name, shape in layer_weights(parsed, layer).items():
            parts: dict[str, tuple[str, tuple[int, ...]]] = {name: ("F16", shape)}
            if layer.startswith("model.layers.") and len(shape) == 2:
                (rows, cols), stem = shape, name.removesuffix("weight")
                parts = {f"{stem}qweight": ("I32", (cols // 8, rows)), f"{stem}scales": ("F16", (cols // 128, rows))}
                parts[f"{stem}qzeros"] = ("I32", (cols // 128, rows // 8))
            for key, (dtype, own) in parts.items():
                nbytes = math.prod(own) * (4 if dtype == "I32" else 2)
                header[key] = {"dtype": dtype, "shape": own, "data_offsets": [end, end + nbytes]}
                end += nbytes
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures with Linux' /proc")
def test_a_worker_holds_the_file_s_bytes_and_little_else(tmp_path: Path, way: str) -> None:
    """The peak of a process that loads eight layers and forwards a few positions."""
    _sparse_gptq(tmp_path / "model")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "model"), way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    taken, in_file = map(int, done.stdout.split())
    assert in_file > 2.4e8
    assert in_file < taken <= 1.15 * in_file
