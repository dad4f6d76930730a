"""The GPU's decode path against the common one: on a GPU by graph, and its parts that need none on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cake_core.model import Batch, LoadOptions, Row, SessionSpec, TextStage, Want, float32_values, int32_tensor, int32_values
from cake_core.requests import SamplingParams
from cake_core.sampling import sample, uniform
from cake_llama.backend import LlamaBackend
from cake_llama.cuda.draws import Draws
from cake_llama.loading import load_stage
from cake_llama.random_model import RandomCheckpoint

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, 80 wide heads": {"hidden_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 80},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 24},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 64},
    "partial rotary": {"partial_rotary_factor": 0.5},
}


def checkpoint_of(name: str) -> RandomCheckpoint:
    base = dict(RandomCheckpoint("tiny").config)
    return RandomCheckpoint("tiny", {**base, "max_position_embeddings": 512, **CONFIGS[name]})


def stage_of(checkpoint: RandomCheckpoint, options: LoadOptions, layers: Sequence[str] = ()) -> TextStage:
    info = LlamaBackend().describe(checkpoint, options)
    return load_stage(checkpoint, info, layers or [layer.name for layer in info.layers], options, None)


def decode(stage: TextStage, prompts: Sequence[Sequence[int]], forced: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probabilities of the 20 best after each forced token, prompts of several sessions side by side."""
    found: list[list[float]] = []
    for number, prompt in enumerate(prompts):
        stage.open(number, SessionSpec(SamplingParams(temperature=0), len(prompt)))
        batch = Batch((Row(number, 0, len(prompt), Want(sample=1)),), {"tokens": int32_tensor(prompt)})
        stage.submit(batch).result(20)
    for step in range(len(forced[0])):
        rows = tuple(Row(i, len(p) + step, 1, Want(sample=1, top=20)) for i, p in enumerate(prompts))
        result = stage.submit(Batch(rows, {"tokens": int32_tensor([f[step] for f in forced])})).result(20)
        found.append(float32_values(result.tensors["top_logprobs"]))
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [1, 3])
def test_graph_equals_eager(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    checkpoint = checkpoint_of(name)
    prompts = [[(7 * i + 3 * r) % 500 for i in range(20 + 9 * r)] for r in range(rows)]
    forced = [[(11 * i + r) % 500 for i in range(40)] for r in range(rows)]
    for dtype, bound in (("f32", 5e-3), ("bf16", 1e-1)):
        options = LoadOptions(dtype=dtype, device="cuda", kv_tokens=4096)
        fast = stage_of(checkpoint, options)
        assert type(fast).__name__ == "CudaStage"
        monkeypatch.setattr("cake_llama.loading._has_triton", lambda: False)
        slow = stage_of(checkpoint, options)
        monkeypatch.undo()
        assert type(slow).__name__ == "LlamaStage"
        a, b = decode(fast, prompts, forced), decode(slow, prompts, forced)
        fast.shutdown()
        slow.shutdown()
        worst = max(abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))
        assert worst < bound, f"{dtype}: {worst}"


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 3])
def test_narrow_weights_in_graphs(quantize: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels on narrow weights against the same weights with PyTorch alone.

    At one row activations have 8 bits, which moves logits by up to 3 % of their spread, as on the CPU; the 20 largest, which
    are compared here, spread 0.4 times as far as all of them, so that 3 % of that are 7.5 % here.
    """
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    checkpoint = checkpoint_of("llama")
    prompts = [[(7 * i + 3 * r) % 500 for i in range(20 + 9 * r)] for r in range(rows)]
    forced = [[(11 * i + r) % 500 for i in range(20)] for r in range(rows)]
    options = LoadOptions(dtype="f32", device="cuda", kv_tokens=4096, quantize=quantize)
    found = []
    for triton in (True, False):
        monkeypatch.setattr("cake_llama.loading._has_triton", lambda: triton)  # noqa: B023 - used at once
        stage = stage_of(checkpoint, options)
        assert (type(stage).__name__ == "CudaStage") == triton
        found.append(torch.tensor(decode(stage, prompts, forced)))
        stage.shutdown()
    error = (found[0] - found[1]).square().mean().sqrt() / found[1].std()
    assert error < (0.03 / 0.4 if rows == 1 else 1e-3), f"{error:.2e}"


@pytest.mark.gpu
def test_hidden_states_of_a_middle_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    checkpoint = checkpoint_of("llama")
    layers = ["model.layers.1", "model.layers.2"]
    results = []
    for triton in (True, False):
        monkeypatch.setattr("cake_llama.loading._has_triton", lambda: triton)  # noqa: B023 - used at once
        stage = stage_of(checkpoint, LoadOptions(dtype="f32", device="cuda", kv_tokens=512), layers)
        stage.open(1, SessionSpec(SamplingParams(), 5))
        values = torch.linspace(-1, 1, 256 * 9).reshape(9, 256)
        from cake_llama.wire import to_wire

        stage.submit(Batch((Row(1, 0, 5),), {"hidden": to_wire(values[:5])})).result(20)
        out = []
        for i in range(5, 9):
            result = stage.submit(Batch((Row(1, i, 1),), {"hidden": to_wire(values[i : i + 1])})).result(20)
            out += float32_values(result.tensors["hidden"])
        results.append(torch.tensor(out))
        stage.shutdown()
    assert (results[0] - results[1]).abs().max() < 5e-3


def mixed(stage: TextStage) -> list[list[int] | list[float]]:
    """What a stage answers to batches that hold single positions, chunks of prompts and guesses, launched all at once where
    one does not need another's answer."""
    specs = [SamplingParams(temperature=0), SamplingParams(seed=3), SamplingParams(temperature=0.7, seed=4, repeat_penalty=1.3)]
    for number, params in enumerate(specs):
        stage.open(number, SessionSpec(params, 30))

    def batch(*rows: Row) -> Batch:
        ids = [
            (31 * row.session + 7 * position) % 500
            for row in rows
            for position in range(row.position, row.position + row.length)
        ]
        return Batch(rows, {"tokens": int32_tensor(ids)})

    one, top = Want(sample=1), Want(sample=1, top=3)
    batches = [
        batch(Row(0, 0, 30, one)),
        batch(Row(0, 30, 1, one), Row(1, 0, 13)),
        batch(Row(1, 13, 17, one), Row(0, 31, 1, one)),
        batch(Row(2, 0, 29), Row(0, 32, 3, Want(sample=3)), Row(1, 30, 1, one)),
        batch(Row(2, 29, 1), Row(1, 31, 1, top)),
        batch(Row(1, 32, 4, Want(sample=4)), Row(2, 30, 1, one), Row(0, 35, 2, Want(sample=2, top=2))),
        batch(Row(2, 31, 5, Want(sample=2)), Row(0, 37, 1, one)),
        batch(Row(0, 38, 1, one), Row(1, 36, 1, one), Row(2, 36, 1, one)),
    ]
    answers = [pending.result(20) for pending in [stage.submit(batch) for batch in batches]]
    return [int32_values(a.tensors["tokens"]) for a in answers] + [
        [round(value, 2) for value in float32_values(a.tensors["top_logprobs"])] for a in answers if "top_logprobs" in a.tensors
    ]


@pytest.mark.gpu
def test_mixed_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    checkpoint, options = checkpoint_of("llama"), LoadOptions(dtype="f32", device="cuda", kv_tokens=4096)
    found = []
    for triton in (True, False):
        monkeypatch.setattr("cake_llama.loading._has_triton", lambda: triton)  # noqa: B023 - used at once
        stage = stage_of(checkpoint, options)
        found.append(mixed(stage))
        stage.shutdown()
    assert [len(tokens) for tokens in found[0]][:8] == [1, 1, 2, 4, 1, 7, 3, 3]
    assert found[0] == found[1]


@pytest.mark.gpu
def test_running_ahead_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that never come to the host between steps: greedy and drawn, equal to the step by step way."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from cake_core.engine.pipeline import Pipeline
    from cake_core.engine.text import TextEngine
    from cake_core.events import TokenEvent
    from cake_core.requests import TextRequest
    from cake_core.stages.stage import LocalStage

    checkpoint = checkpoint_of("llama")
    options = LoadOptions(dtype="f32", device="cuda", kv_tokens=4096)
    info = LlamaBackend().describe(checkpoint, options)
    found = []
    for ahead in (True, False):
        monkeypatch.setattr("cake_llama.loading._has_triton", lambda: ahead)  # noqa: B023 - used at once
        stage = LocalStage("master", stage_of(checkpoint, options))
        assert stage.runs_ahead == ahead
        engine = TextEngine(info, LlamaBackend().tokenizer(checkpoint), Pipeline([stage]))
        requests = [
            TextRequest(tuple(range(5, 30 + i)), SamplingParams(seed=i, temperature=i / 4, top_k=40 * (i % 2)), max_tokens=50)
            for i in range(5)
        ]
        found.append([[e.token for e in engine.generate(request) if isinstance(e, TokenEvent)] for request in requests])
        engine.close()
        stage.shutdown()
    assert found[0] == found[1]


@pytest.mark.parametrize("seed", range(6))
def test_draws_of_a_batch_equal_the_reference(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(8, 300, generator=generator) * 3).round(decimals=1)  # rounded: ties happen
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, seed=1),
        SamplingParams(temperature=1.3, top_k=5, seed=2),
        SamplingParams(top_p=0.6, seed=3),
        SamplingParams(min_p=0.1, seed=4),
        SamplingParams(temperature=0.9, top_k=40, top_p=0.8, min_p=0.02, seed=5),
        SamplingParams(top_k=1, seed=6),
        SamplingParams(top_p=0.0, seed=7),
    ]
    position = 17 + seed
    uniforms = [uniform(p.seed, 0, position) for p in params]
    found = Draws(params, uniforms, torch.device("cpu")).draw(logits, logits.argmax(-1))
    expected = [sample(row.tolist(), p, list(range(position)), 0, position, 0) for row, p in zip(logits, params, strict=True)]
    assert found.tolist() == expected
    assert int32_values(int32_tensor(expected)) == expected
