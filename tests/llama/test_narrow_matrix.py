"""The form that weights have on devices other than the CPU: the values of the file, at its width."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.kernels.weights_table import BLOCKS, random_blocks
from torch.nn.functional import linear

from cake_core.model import Batch, LoadOptions, Row, SessionSpec, Want, float32_values, int32_tensor
from cake_core.requests import SamplingParams
from cake_llama import loading
from cake_llama.backend import LlamaBackend
from cake_llama.codes import coded
from cake_llama.narrow import NarrowedWeights, quantized
from cake_llama.narrow_loader import NarrowLoader
from cake_llama.narrow_matrix import Narrow, NarrowEmbedding, NarrowLinear, joined, pack, stacked
from cake_llama.packed import Blocks, Packed, stored
from cake_llama.random_model import RandomCheckpoint

CPU = torch.device("cpu")
HALF = 2.0**-11
"""What rounding a scale to f16 costs at most, relative to it."""


def blocks(kind: str, rows: int, cols: int, seed: int = 0) -> Blocks:
    data = torch.from_numpy(random_blocks(kind, rows, cols, np.random.default_rng(seed)))
    return Blocks(kind, (rows, cols), data)


def narrowed(rows: Packed) -> Narrow:
    found = coded(rows, CPU)
    assert found is not None
    return pack(found)


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_keep_their_values_and_their_width(kind: str) -> None:
    file = blocks(kind, 24, 768)
    found, expected = narrowed(file), file.dequantized()
    largest = expected.view(24, -1, 32).abs().amax(-1, keepdim=True)
    error = (found.dequantized() - expected).view(24, -1, 32).abs()
    assert found.shape == (24, 768)
    # Scale and least value are of the size of the largest weight of the whole block of 256 at most, twice as large together.
    bound = 0.0 if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0") else 4 * HALF * expected.abs().max()
    assert (error <= bound + 1e-6 * largest).all()
    assert found.nbytes <= 1.15 * file.nbytes


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_groups_keep_their_values(kind: str) -> None:
    rows = quantized(torch.randn(24, 768, generator=torch.Generator().manual_seed(0)), kind)
    found, expected = narrowed(rows), rows.dequantized()
    assert (found.dequantized() - expected).abs().max() <= HALF * expected.abs().max()
    assert found.nbytes <= 1.15 * rows.nbytes


def test_what_has_no_place_is_left_alone() -> None:
    assert coded(stored(torch.zeros(4, 64)), CPU) is None
    assert coded(Blocks("Q3_K", (1, 256), torch.zeros(1, 110, dtype=torch.uint8)), CPU) is None


def test_products_of_stacked_matrices() -> None:
    parts = [narrowed(blocks(kind, 8, 256, seed)) for seed, kind in enumerate(("Q4_K", "Q4_K", "Q6_K", "Q4_0"))]
    layer = NarrowLinear(stacked(parts), torch.arange(32.0))
    assert len(layer.parts) == 3
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    expected = linear(x, torch.cat([part.dequantized() for part in parts]), torch.arange(32.0))
    torch.testing.assert_close(layer(x), expected)
    table = NarrowEmbedding(joined(parts[:2]))
    assert torch.equal(table[torch.tensor([9, 0])], torch.stack((parts[1].dequantized()[1], parts[0].dequantized()[0])))


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_model_narrowed_at_load(quantize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another device loads it, on this one: the logits stay those of the plain weights within what the width costs."""
    checkpoint, backend = RandomCheckpoint("tiny"), LlamaBackend()
    tokens = [(7 * i) % 500 for i in range(40)]
    found = []
    for options in (LoadOptions(device="cpu", dtype="f32"), LoadOptions(device="cpu", dtype="f32", quantize=quantize)):
        if options.quantize:
            monkeypatch.setattr(loading, "keeps_width", lambda *_: True)
        stage = backend.load(
            checkpoint, (info := backend.describe(checkpoint, options)), [layer.name for layer in info.layers], options
        )
        stage.open(1, SessionSpec(SamplingParams(), 40))
        targets = int32_tensor([*tokens[1:], -1])
        batch = Batch((Row(1, 0, 40, Want(score=True)),), {"tokens": int32_tensor(tokens), "targets": targets})
        found.append(torch.tensor(float32_values(stage.submit(batch).result(20).tensors["score_logprobs"])[:-1]))
        if options.quantize:
            assert stage.memory().weights <= 1.1 * sum(layer.nbytes for layer in info.layers)
        stage.shutdown()
    error = (found[1] - found[0]).square().mean().sqrt() / found[0].std()
    assert 0 < error < {"int8": 0.05, "int4": 0.5}[quantize]


def test_the_loader_says_what_it_loaded() -> None:
    checkpoint = RandomCheckpoint("tiny")
    from cake_llama.config import ModelConfig
    from cake_llama.model import Dtypes
    from cake_llama.weights import weight_source

    moved: list[int] = []
    dtypes = Dtypes(torch.float32, torch.float32)
    source = weight_source(checkpoint, CPU)
    config = ModelConfig.from_checkpoint(checkpoint)
    with torch.inference_mode():
        NarrowLoader(config, NarrowedWeights(source, "int4"), CPU, dtypes, False, moved.append).block(0, 0)
    norms = 2 * 4 * config.hidden_size
    weights = sum(
        int(np.prod(tensor.shape)) for name, tensor in checkpoint.tensors.items() if ".layers.0." in name and "norm" not in name
    )
    assert sum(moved) == norms + weights * 20 // 32
