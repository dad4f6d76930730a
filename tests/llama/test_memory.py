"""A worker holds its layers and little else, measured in a process of its own: whole folder and bundle."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cake_core.checkpoint import ABSENT, SafetensorsCheckpoint
from cake_core.errors import CapacityError, CheckpointError
from cake_core.model import LoadOptions
from cake_llama import loading
from cake_llama.backend import LlamaBackend
from cake_llama.config import ModelConfig
from cake_llama.names import layer_names, layer_weights

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}  # fmt: skip
OWN = [f"model.layers.{index}" for index in range(5, 14)]
KV_TOKENS = 1024

MEASURE = """
import sys
from pathlib import Path
from cake_core.checkpoint import SafetensorsCheckpoint
from cake_core.model import SAMPLE, Batch, LoadOptions, Row, SessionSpec, Tensor
from cake_core.requests import SamplingParams
from cake_llama.backend import LlamaBackend
import cake_llama.loading, torch

def kilobytes(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))

torch.set_num_threads(1)
before = kilobytes("VmRSS")
checkpoint, backend = SafetensorsCheckpoint(Path(sys.argv[1])), LlamaBackend()
options = LoadOptions(dtype=sys.argv[2], device="cpu", kv_tokens=int(sys.argv[3]), threads=1)
info = backend.describe(checkpoint, options)
stage = backend.load(checkpoint, info, sys.argv[4:], options)
peak = kilobytes("VmHWM")
weights = sum(info.layer(name).nbytes for name in sys.argv[4:])
cache = sum(info.layer(name).kv_bytes_per_token for name in sys.argv[4:]) * options.kv_tokens
assert weights <= stage.memory().weights < 1.01 * weights  # cake-kernels keeps norms and biases in f32
print((peak - before) * 1024, weights, cache)
"""


def write_model(folder: Path, layers: Sequence[str] | None = None, config: dict[str, Any] = CONFIG) -> Path:
    """A model of zeros, which take no room on the disk; with `layers` a bundle of these alone."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    parsed = ModelConfig.from_checkpoint(SafetensorsCheckpoint(folder))
    header: dict[str, Any] = {}
    absent, end = {}, 0
    for layer in layer_names(parsed):
        for name, shape in layer_weights(parsed, layer).items():
            nbytes = 2 * math.prod(shape)
            if layers is not None and layer not in layers:
                absent[name] = ["BF16", list(shape), nbytes]
                continue
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + nbytes]}
            end += nbytes
    if absent:
        (folder / ABSENT).write_text(json.dumps(absent))
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures with Linux' /proc")
@pytest.mark.parametrize("bundle", [False, True], ids=["folder", "bundle"])
def test_a_worker_holds_its_layers_and_little_else(tmp_path: Path, bundle: bool) -> None:
    folder = write_model(tmp_path / "model", OWN if bundle else None)
    command = [sys.executable, "-c", MEASURE, str(folder), "bf16", str(KV_TOKENS), *OWN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    taken, weights, cache = map(int, done.stdout.split())
    assert weights > 1e9
    assert weights < taken <= 1.15 * weights + cache


SMALL = {
    **CONFIG,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


def test_a_bundle_is_described_as_the_whole_model(tmp_path: Path) -> None:
    backend = LlamaBackend()
    whole, bundle = (
        backend.describe(SafetensorsCheckpoint(write_model(tmp_path / name, layers, SMALL)), LoadOptions())
        for name, layers in (("whole", None), ("bundle", OWN))
    )
    assert whole.layers == bundle.layers
    assert whole.identity == bundle.identity


def test_a_bundle_names_the_layer_that_it_lacks(tmp_path: Path) -> None:
    backend, checkpoint = LlamaBackend(), SafetensorsCheckpoint(write_model(tmp_path / "bundle", OWN, SMALL))
    info = backend.describe(checkpoint, LoadOptions())
    with pytest.raises(CheckpointError, match=r"does not hold model\.layers\.4"):
        backend.load(checkpoint, info, ["model.layers.4", "model.layers.5"], LoadOptions(device="cpu"))


def test_layers_that_do_not_fit_are_refused_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, checkpoint = LlamaBackend(), SafetensorsCheckpoint(write_model(tmp_path / "model", None, SMALL))
    info = backend.describe(checkpoint, LoadOptions())
    monkeypatch.setattr(loading, "available_bytes", lambda device: 2 * info.layer("model.layers.0").nbytes + 1)
    with pytest.raises(CapacityError, match=r"3 layers need .* 2 of them would fit"):
        backend.load(
            checkpoint,
            info,
            [f"model.layers.{i}" for i in range(3)],
            LoadOptions(device="cpu"),
            progress=lambda done, total: pytest.fail("loading began"),
        )


def test_a_weight_that_is_missing_or_of_another_shape_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", None, SMALL)
    (folder / "config.json").write_text(json.dumps({**SMALL, "num_key_value_heads": 4}))
    with pytest.raises(CheckpointError, match=r"self_attn\.k_proj\.weight' is \[32, 64\], the configuration says \[64, 64\]"):
        LlamaBackend().describe(SafetensorsCheckpoint(folder), LoadOptions())
    (folder / "config.json").write_text(json.dumps({**SMALL, "attention_bias": True}))
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.0\.self_attn\.q_proj\.bias'"):
        LlamaBackend().describe(SafetensorsCheckpoint(folder), LoadOptions())
