"""GGUF files of every served architecture against the Hugging Face model they were made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cake_core.checkpoint import SafetensorsCheckpoint
from cake_core.errors import CheckpointError, UnsupportedModel
from cake_core.formats.gguf import GgufCheckpoint
from cake_core.model import LoadOptions
from cake_core.split import split
from cake_core.topology import parse_topology
from cake_llama import gguf_weights
from cake_llama.backend import LlamaBackend
from cake_llama.config import ModelConfig
from cake_llama.gguf_config import hf_config
from cake_llama.gguf_weights import GgufWeights
from cake_llama.rotary import Rotary
from cake_llama.weights import weight_source

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "pad_token_id": 0,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 5000.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)],
}  # fmt: skip
MODELS: dict[str, tuple[str, Callable[[], PreTrainedModel]]] = {
    "llama": ("llama", lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_theta=5e5, tie_word_embeddings=True))),
    "llama-bias": ("llama", lambda: LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=32, rope_theta=1e4))),
    "mistral": ("llama", lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None, rope_theta=1e6))),
    "qwen2": ("qwen2", lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, rope_theta=1e6))),
    "qwen3": ("qwen3", lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32, rope_theta=1e6))),
    "phi3": ("phi3", lambda: Phi3ForCausalLM(Phi3Config(
        **SIZES, sliding_window=64, rope_parameters=LONGROPE, original_max_position_embeddings=64))),
}  # fmt: skip


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """As the converter of llama.cpp lays out q and k of its `llama` architecture."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, arch: str, model: PreTrainedModel, **more: Any) -> GgufCheckpoint:
    """By the gguf package: its writer and its table of names."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    for name, value in more.pop("metadata", {}).items():
        writer.add_float32(name, value) if isinstance(value, float) else writer.add_uint32(name, value) if isinstance(
            value, int
        ) else writer.add_string(name, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.detach().float().numpy()
        if arch == "llama" and ".q_proj" in name:
            data = interleaved(data, config.num_attention_heads)
        if arch == "llama" and ".k_proj" in name:
            data = interleaved(data, config.num_key_value_heads)
        found = names.get_name(name, (".weight", ".bias"))
        assert found is not None
        add_tensor(writer, found, data, more.get("quantise"))
    for name, data in more.pop("tensors", {}).items():
        writer.add_tensor(name, np.asarray(data, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufCheckpoint(path)


def add_tensor(writer: gguf.GGUFWriter, name: str, data: np.ndarray, dtype: str | None) -> None:
    if dtype is None or data.ndim == 1:
        writer.add_tensor(name, data)
    else:
        kind = gguf.GGMLQuantizationType[dtype]
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)


def make(name: str, seed: int = 0) -> tuple[str, PreTrainedModel]:
    torch.manual_seed(seed)
    arch, build = MODELS[name]
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)  # biases and norms too
    return arch, model


def longrope_metadata(model: PreTrainedModel) -> dict[str, Any]:
    length, original = model.config.max_position_embeddings, LONGROPE["original_max_position_embeddings"]
    factor = math.sqrt(1 + math.log(length / original) / math.log(original))
    return {
        "metadata": {"phi3.rope.scaling.attn_factor": factor, "phi3.rope.scaling.original_context_length": original},
        "tensors": {
            "rope_factors_short.weight": LONGROPE["short_factor"], "rope_factors_long.weight": LONGROPE["long_factor"],
        },
    }  # fmt: skip


def both(name: str, folder: Path, **more: Any) -> tuple[PreTrainedModel, GgufCheckpoint, SafetensorsCheckpoint]:
    arch, model = make(name)
    if arch == "phi3":
        more |= longrope_metadata(model)
    model.save_pretrained(folder / "hf")
    return model, write_gguf(folder / "m.gguf", arch, model, **more), SafetensorsCheckpoint(folder / "hf")


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    model, checkpoint, _ = both(name, tmp_path)
    weights = weight_source(checkpoint, torch.device("cpu"))
    assert isinstance(weights, GgufWeights)
    expected = {key: value for key, value in model.state_dict().items() if key in weights.names()}
    assert model.state_dict().keys() - expected.keys() <= {"lm_head.weight"}
    assert set(weights.names()) == set(expected)
    for key, value in expected.items():
        assert torch.equal(weights.load(key, torch.float32), value), key
        assert torch.equal(weights.load(key, torch.bfloat16), value.to(torch.bfloat16)), key


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_is_that_of_the_model(name: str, tmp_path: Path) -> None:
    _, checkpoint, folder = both(name, tmp_path)
    found, expected = ModelConfig.from_checkpoint(checkpoint), ModelConfig.from_checkpoint(folder)
    ours, theirs = Rotary(found.rope, torch.device("cpu")), Rotary(expected.rope, torch.device("cpu"))
    assert ours.attention_factor == pytest.approx(theirs.attention_factor)
    for length in (10, 100):
        for mine, other in zip(*(r.angles(torch.arange(8), torch.full((8,), length)) for r in (ours, theirs)), strict=True):
            torch.testing.assert_close(mine, other)
    for field in ModelConfig.__slots__:
        if field not in ("architecture", "rope", "norm_eps", "dtype"):
            assert getattr(found, field) == getattr(expected, field), field
    assert found.norm_eps == pytest.approx(expected.norm_eps)
    assert (found.dtype, found.rope.dim, found.rope.theta) == ("f32", expected.rope.dim, expected.rope.theta)


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0", "BF16", "F16"])
def test_quantised_weights_are_permuted_after_they_are_read(dtype: str, tmp_path: Path) -> None:
    model, checkpoint, _ = both("llama", tmp_path, quantise=dtype)
    kind, heads = gguf.GGMLQuantizationType[dtype], model.config.num_attention_heads
    weights = GgufWeights(checkpoint)
    for key, value in model.state_dict().items():
        if ".q_proj" in key:
            stored = gguf.quants.dequantize(gguf.quants.quantize(interleaved(value.numpy(), heads), kind), kind)
            back = stored.reshape(heads, -1, 2, stored.shape[1]).swapaxes(1, 2).reshape(stored.shape)
            assert torch.equal(weights.load(key, torch.float32), torch.from_numpy(back.astype(np.float32)))
    assert ModelConfig.from_checkpoint(checkpoint).dtype == ("bf16" if dtype == "BF16" else "f16")


def test_pieces_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, checkpoint, _ = both("llama", tmp_path, quantise="Q8_0")
    weights = GgufWeights(checkpoint)
    whole = {name: weights.load(name, torch.float32) for name in weights.names()}
    monkeypatch.setattr(gguf_weights, "CHUNK_VALUES", 96)
    for name, value in whole.items():
        assert torch.equal(weights.load(name, torch.float32), value)


def test_biases_of_a_llama_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
    checkpoint = write_gguf(tmp_path / "m.gguf", "llama", model)
    assert ModelConfig.from_checkpoint(checkpoint).qkv_bias
    weights = GgufWeights(checkpoint)
    for key, value in model.state_dict().items():
        assert torch.equal(weights.load(key, torch.float32), value), key


def llama3_factors(base: float, dim: int, factor: float, low: float, high: float, original: int) -> list[float]:
    """As the converter of llama.cpp writes `rope_freqs.weight`."""
    found = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * base ** (i / dim)
        if wavelength < original / high:
            found.append(1.0)
        elif wavelength > original / low:
            found.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found


@pytest.mark.parametrize(
    ("parameters", "more"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scale_linear": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
        ),
        (
            {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            {},
        ),
    ],
    ids=["linear", "old-linear", "yarn", "llama3"],
)  # fmt: skip
def test_scaled_positions(parameters: dict[str, Any], more: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters={"rope_theta": 1e4, **parameters}))
    tensors = {"rope_freqs.weight": llama3_factors(1e4, 16, 8.0, 1.0, 4.0, 32)} if parameters["rope_type"] == "llama3" else {}
    metadata = {f"llama.{key}": value for key, value in more.items()}
    checkpoint = write_gguf(tmp_path / "m.gguf", "llama", model, metadata=metadata, tensors=tensors)
    model.save_pretrained(tmp_path / "hf")
    configs = (ModelConfig.from_checkpoint(c) for c in (checkpoint, SafetensorsCheckpoint(tmp_path / "hf")))
    ours, theirs = (Rotary(config.rope, torch.device("cpu")) for config in configs)
    assert ours.attention_factor == pytest.approx(theirs.attention_factor)
    for length in (5, 100):
        angles = (rotary.angles(torch.arange(100), torch.full((100,), length)) for rotary in (ours, theirs))
        for mine, other in zip(*angles, strict=True):
            torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-5)
    assert "rope_freqs.weight" not in GgufWeights(checkpoint).names()


@pytest.mark.parametrize(
    ("arch", "metadata", "error", "message"),
    [
        ("gemma2", {}, UnsupportedModel, "architecture 'gemma2'; served are llama, qwen2, qwen3, phi3"),
        ("llama", {"llama.expert_count": 8}, UnsupportedModel, "mixture of experts"),
        ("llama", {"llama.rope.scaling.type": "odd"}, UnsupportedModel, "scales positions by 'odd'"),
        ("llama", {"llama.attention.value_length": 7}, UnsupportedModel, "keys and values of different length"),
        ("llama", {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": -1.0}, CheckpointError, "factor is -1"),
    ],
)
def test_what_is_not_served_is_named(
    arch: str, metadata: dict[str, Any], error: type[CheckpointError], message: str, tmp_path: Path
) -> None:
    _, model = make("llama")
    checkpoint = write_gguf(tmp_path / "m.gguf", "llama", model, metadata=metadata)
    checkpoint.files[0].metadata["general.architecture"] = arch  # type: ignore[index]
    with pytest.raises(error, match=message):
        hf_config(checkpoint)


def test_missing_values_are_named(tmp_path: Path) -> None:
    _, model = make("llama")
    checkpoint = write_gguf(tmp_path / "m.gguf", "llama", model)
    del checkpoint.files[0].metadata["llama.embedding_length"]  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"llama\.embedding_length is None"):
        hf_config(checkpoint)


def test_a_tensor_nobody_knows_or_reads_is_named(tmp_path: Path) -> None:
    _, model = make("llama")
    strange = write_gguf(tmp_path / "m.gguf", "llama", model, tensors={"blk.0.odd.weight": [1.0]})
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.odd\.weight"):
        GgufWeights(strange).names()
    with pytest.raises(CheckpointError, match=r"has no model\.layers\.9"):
        GgufWeights(write_gguf(tmp_path / "n.gguf", "llama", model)).load("model.layers.9.mlp.up_proj.weight", torch.float32)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    _, model = make("llama")
    checkpoint = write_gguf(tmp_path / "m.gguf", "llama", model)
    weights = GgufWeights(checkpoint)
    assert weights.names()
    last = max(checkpoint.tensors.values(), key=lambda tensor: tensor.offset)
    with checkpoint.path.open("r+b") as file:
        file.truncate(last.offset + 1)
    key = next(key for key, tensor in weights.tensors.items() if tensor is last)
    with pytest.raises(CheckpointError, match="ends within"):
        weights.load(key, torch.float32)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("form", ["gguf", "safetensors"])
def test_a_bundle_is_described_as_the_whole_model(name: str, form: str, tmp_path: Path) -> None:
    _, gguf_checkpoint, folder = both(name, tmp_path)
    whole: Any = gguf_checkpoint if form == "gguf" else folder
    backend = LlamaBackend()
    info = backend.describe(whole, LoadOptions())
    topology = parse_topology({"a": {"host": "h:1", "layers": ["model.layers.1"]}, "b": {"host": "h:2", "layers": ["lm_head"]}})
    for bundle in split(whole, info, topology, tmp_path / "out"):
        model = bundle.folder / "model"
        part = GgufCheckpoint(model / "reduced.gguf") if form == "gguf" else SafetensorsCheckpoint(model)
        found = backend.describe(part, LoadOptions())
        assert found.layers == info.layers
        assert found.identity == info.identity
        assert ModelConfig.from_checkpoint(part) == ModelConfig.from_checkpoint(whole)
        assert backend.accepts(part)
