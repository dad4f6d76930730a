"""Half-width weights, arithmetic the device lacks, and stages of different dtype, against transformers in f32 on the same
rounded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.llama.oracle_rig import (
    BACKEND,
    CASES,
    LAYERS,
    Oracle,
    difference,
    load_chain,
    sequence,
    stage_logits,
    write_checkpoint,
)

from cake_core.checkpoint import SafetensorsCheckpoint
from cake_core.errors import ConfigError, StageError
from cake_core.model import SAMPLE, Batch, LoadOptions, Row, SessionSpec, int32_tensor
from cake_core.testing.contracts.text_rig import GREEDY, Chain
from cake_llama import loading
from cake_llama.wire import from_wire, hidden_from_wire

HALF = {"bf16": torch.bfloat16, "f16": torch.float16}
BOUNDS = {"bf16": 2e-2, "f16": 4e-3}
"""Of the largest logit: bf16 keeps 8 bits, f16 11."""
MIXED = 2e-2
"""For stages of f16, bf16 and f32 in a row: what the narrowest of them alone may cost."""

CUT = [
    ("model.embed_tokens", "model.layers.0"),
    ("model.layers.1", "model.layers.2"),
    ("model.layers.3", "model.norm", "lm_head"),
]


def half(folder: Path, dtype: str, name: str = "qwen2-window") -> tuple[Path, Oracle]:
    write_checkpoint(folder, CASES[name], HALF[dtype], gain=1.0)
    return folder, Oracle(folder)


def error_of(chain: Chain, oracle: Oracle, length: int = 40) -> float:
    tokens = sequence(length)
    return difference(stage_logits(chain, tokens, [length - 4, 1, 1, 2]), oracle.logits(tokens))


def assert_holds(chain: Chain, nbytes: int) -> None:
    """Where cake-kernels is installed, norms and biases are kept in f32, whatever the matrices are."""
    assert nbytes <= chain.stages[0].memory().weights <= 1.02 * nbytes


@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "phi3-longrope"])
@pytest.mark.parametrize("dtype", HALF)
def test_half_width_is_near(tmp_path: Path, name: str, dtype: str) -> None:
    folder, oracle = half(tmp_path, dtype, name)
    assert error_of(load_chain(folder, options=[LoadOptions(dtype=dtype, device="cpu")]), oracle) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", HALF)
def test_auto_keeps_the_width_of_the_file(tmp_path: Path, dtype: str) -> None:
    folder, oracle = half(tmp_path, dtype)
    options = LoadOptions(device="cpu")
    info = BACKEND.describe(SafetensorsCheckpoint(folder), options)
    assert (info.dtype, info.layers[1].nbytes) == (dtype, info.layers[1].file_nbytes)
    chain = load_chain(folder, options=[options])
    assert chain.stages[0].memory().dtype == dtype
    assert_holds(chain, sum(x.nbytes for x in info.layers))
    assert error_of(chain, oracle) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", HALF)
def test_f32_where_the_arithmetic_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Stored in half, computed in f32: nothing but the cache is rounded."""
    folder, oracle = half(tmp_path, dtype)
    monkeypatch.setattr(loading, "computes", lambda device, asked: asked is torch.float32)
    monkeypatch.setattr(loading, "cpu_loader", lambda *arguments: None)  # as on a device for which we have no kernels
    options = LoadOptions(dtype=dtype, device="cpu", kv_dtype="f32")
    chain = load_chain(folder, options=[options])
    assert_holds(chain, sum(x.file_nbytes for x in BACKEND.describe(SafetensorsCheckpoint(folder), options).layers))
    assert error_of(chain, oracle) < 1e-4


@pytest.mark.parametrize("order", [("f16", "bf16", "f32"), ("f32", "f16", "bf16"), ("bf16", "f32", "f16")], ids="-".join)
def test_stages_of_different_dtype_work_together(tmp_path: Path, order: tuple[str, str, str]) -> None:
    folder, oracle = half(tmp_path, "bf16")
    chain = load_chain(folder, CUT, [LoadOptions(dtype=dtype, device="cpu") for dtype in order])
    assert error_of(chain, oracle) < MIXED


@pytest.mark.parametrize("wire", ["f32", "f16", "bf16"])
def test_hidden_states_leave_as_the_wire_wants_them(tmp_path: Path, wire: str) -> None:
    write_checkpoint(tmp_path, CASES["llama"])
    first, _ = load_chain(tmp_path, [CUT[0], CUT[1] + CUT[2]]).stages
    first.open(1, SessionSpec(GREEDY, 3, wire_dtype=wire))
    hidden = first.submit(Batch((Row(1, 0, 3, SAMPLE),), {"tokens": int32_tensor([1, 2, 3])})).result().tensors["hidden"]
    assert (hidden.dtype, hidden.shape) == (wire, (3, 64))
    with pytest.raises(StageError, match="f99"):
        first.open(2, SessionSpec(GREEDY, 3, wire_dtype="f99"))


def test_prompts_cross_in_eight_bits_with_a_scale_a_position(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CASES["llama"])
    first, second = load_chain(tmp_path, [CUT[0], CUT[1] + CUT[2]]).stages
    tokens = int32_tensor([1, 2, 3])
    found = {}
    for session, wire in enumerate(("f32", "f8e4m3")):
        for stage in (first, second):
            stage.open(session, SessionSpec(GREEDY, 3, wire_dtype=wire))
        rows = (Row(session, 0, 3, SAMPLE),)
        sent = found[wire] = first.submit(Batch(rows, {"tokens": tokens})).result().tensors["hidden"]
        answer = second.submit(Batch(rows, {"tokens": tokens, "hidden": sent})).result()
        assert answer.tensors["tokens"].shape == (1,)
        after = first.submit(Batch((Row(session, 3, 1, SAMPLE),), {"tokens": int32_tensor([4])})).result()
        assert after.tensors["hidden"].dtype == "f32"  # what is drawn from right away keeps all its bits
    exact = from_wire(found["f32"], torch.device("cpu"))
    near = hidden_from_wire(found["f8e4m3"], torch.device("cpu"), torch.float32)
    assert found["f8e4m3"].nbytes * 4 == found["f32"].nbytes + 3 * 16
    # Three bits of mantissa, or the smallest step where a value is far below its position's largest.
    allowed = exact.abs() / 16 + exact.abs().amax(1, keepdim=True) * 2**-10 / 448
    assert bool(((near - exact).abs() <= allowed * 1.001).all())
    assert not torch.equal(near, exact)


@pytest.mark.parametrize(("kv", "vector"), [("f16", 16 * 2), ("bf16", 16 * 2), ("int8", 16 + 4)])
def test_a_narrower_cache_is_near(tmp_path: Path, kv: str, vector: int) -> None:
    """In int8 each vector of a head has a scale in f32."""
    folder = write_checkpoint(tmp_path, CASES["llama"], gain=1.0)
    options = [LoadOptions(dtype="f32", device="cpu", kv_dtype=kv) for kv in ("f32", kv)]
    sizes = [BACKEND.describe(SafetensorsCheckpoint(folder), own).layers[1].kv_bytes_per_token for own in options]
    assert sizes == [2 * 2 * 16 * 4, 2 * 2 * vector]
    chain = load_chain(folder, options=options[1:])
    assert chain.stages[0].memory().kv_bytes_per_token == LAYERS * sizes[1]
    assert 1e-5 < error_of(chain, Oracle(folder)) < 2e-2


@pytest.mark.parametrize("options", [LoadOptions(quantize="int3"), LoadOptions(kv_dtype="f64")], ids=["int3", "f64"])
def test_what_is_not_served_is_said(tmp_path: Path, options: LoadOptions, request: pytest.FixtureRequest) -> None:
    checkpoint = SafetensorsCheckpoint(write_checkpoint(tmp_path, CASES["llama"]))
    with pytest.raises(ConfigError, match=rf"{request.node.callspec.id}.* use "):
        BACKEND.describe(checkpoint, options)
