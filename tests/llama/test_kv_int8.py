"""`--kv-dtype int8`: the cache with a scale a vector, in PyTorch and in the decode step in C."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.kernels.native import available
from tests.llama.test_quant import SPEC, TOKENS, load, logprobs, write

from cake_core.model import Batch, Row, SessionSpec, TextStage, Want, float32_values, int32_tensor
from cake_llama.cpu import loader

NEAR = 0.02
"""Root mean square of the logits' error beside an f32 cache: a value is rounded by at most 1 in 254 of its vector's largest."""


@pytest.fixture(params=["kernels", "torch"])
def stages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[TextStage, TextStage]:
    """The same model with a cache in f32 and in int8."""
    if request.param == "torch":
        monkeypatch.setattr(loader, "has_kernels", lambda: False)
    elif not available():
        pytest.skip("cake-kernels is neither installed nor can it be built here")
    checkpoint = write(tmp_path / "model.gguf", "Q8_0")
    return load(checkpoint, kv_dtype="f32"), load(checkpoint, kv_dtype="int8")


def test_logits_are_near_those_of_a_wide_cache(stages: tuple[TextStage, TextStage]) -> None:
    wide, narrow = stages
    assert narrow.memory().kv_bytes_per_token * 4 == wide.memory().kv_bytes_per_token * (64 + 4) / 64
    expected = logprobs(wide, TOKENS, 40)
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
    for chunk in (1, 7, 40):
        error = float((logprobs(narrow, TOKENS, chunk) - expected).square().mean().sqrt() / spread)
        assert 1e-5 < error < NEAR


def _scores(stage: TextStage, session: int, start: int, tokens: list[int]) -> list[float]:
    row = Row(session, start, len(tokens), Want(score=True))
    given = {"tokens": int32_tensor(tokens), "targets": int32_tensor(TOKENS[: len(tokens)])}
    return list(float32_values(stage.submit(Batch((row,), given)).result().tensors["score_logprobs"]))


def test_a_shared_block_is_copied_with_its_scales(stages: tuple[TextStage, TextStage]) -> None:
    """Two sessions go on differently from the middle of a block; each says what it says alone."""
    stage, other = stages[1], [int(token) for token in reversed(TOKENS)]
    stage.open(1, SPEC)
    _scores(stage, 1, 0, TOKENS[:20])
    assert stage.open(2, SPEC, parent=1, length=20) == 20
    first = _scores(stage, 1, 20, TOKENS[20:25])
    second = _scores(stage, 2, 20, other[20:25])
    alone = []
    for number, more in ((3, TOKENS), (4, other)):
        stage.open(number, SessionSpec(SPEC.sampling, SPEC.prompt_length))
        _scores(stage, number, 0, TOKENS[:20])
        alone.append(_scores(stage, number, 20, more[20:25]))
    torch.testing.assert_close(torch.tensor([first, second]), torch.tensor(alone), atol=1e-5, rtol=0)
    assert alone[0] != alone[1]
