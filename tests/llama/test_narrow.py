"""`split-model --quantize`: bundles made once say what the same quantisation at load says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.llama.oracle_rig import VOCABULARY, Oracle, load_chain, sequence, stage_logits

from cake_core.checkpoint import SafetensorsCheckpoint
from cake_core.errors import ConfigError
from cake_core.model import LoadOptions
from cake_core.split import narrowed, split
from cake_core.testing.toy_text import ToyTextBackend
from cake_core.topology import parse_topology
from cake_llama.backend import LlamaBackend
from cake_llama.cpu import loader

BACKEND = LlamaBackend()
Models = Callable[[str], tuple[Path, Oracle]]


@pytest.fixture(autouse=True)
def _without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations in f32, so that equal weights give equal logits."""
    monkeypatch.setattr(loader, "has_kernels", lambda: False)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "phi3"])
@pytest.mark.parametrize(("quantize", "share"), [("int8", 0.30), ("int4", 0.25)])
def test_a_bundle_says_what_quantising_at_load_says(
    model_of: Models, tmp_path: Path, name: str, quantize: str, share: float
) -> None:
    folder, _ = model_of(name)
    whole = SafetensorsCheckpoint(folder)
    layers = [layer.name for layer in BACKEND.describe(whole, LoadOptions()).layers]
    topology = parse_topology({"a": {"host": "h:1", "layers": layers[:3]}, "b": {"host": "h:2", "layers": layers[3:]}})
    out = tmp_path / "out"
    with narrowed(BACKEND, whole, quantize, out) as copy:
        bundles = split(copy, BACKEND.describe(copy, LoadOptions()), topology, out)
    assert sorted(path.name for path in out.iterdir()) == ["a-node", "b-node", "master-node"]
    in_file = sum(tensor.nbytes for tensor in whole.tensors.values())  # f32
    assert sum(bundle.nbytes for bundle in bundles) < (share + (0.1 if name == "llama-tied" else 0)) * in_file
    options = LoadOptions(device="cpu", kv_dtype="f32")
    stages = []
    for bundle in bundles[:2]:
        part = SafetensorsCheckpoint(bundle.folder / "model")
        info = BACKEND.describe(part, options)
        assert sum(info.layer(layer).nbytes for layer in bundle.layers) <= bundle.nbytes
        stages.append(BACKEND.load(part, info, bundle.layers, options))
    at_load = load_chain(folder, options=[LoadOptions(device="cpu", kv_dtype="f32", quantize=quantize)])
    tokens = sequence(20)
    expected = stage_logits(at_load, tokens, [20])
    found = stage_logits(type(at_load)(stages), tokens, [20])
    assert expected.shape == (20, VOCABULARY)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_copy_names_its_method_as_others_read_it(model_of: Models, tmp_path: Path) -> None:
    with narrowed(BACKEND, SafetensorsCheckpoint(model_of("llama")[0]), "int4", tmp_path) as copy:
        config = json.loads((copy.path / "config.json").read_text())["quantization_config"]
        assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
        codes = copy.tensors["model.layers.0.mlp.down_proj.weight_packed"]
        assert (codes.dtype, codes.shape) == ("I32", (64, 96 // 8))
        with pytest.raises(ConfigError, match="quantised already"):
            BACKEND.narrow(copy, "int8", tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_narrowed_says_so(model_of: Models, tmp_path: Path) -> None:
    whole = SafetensorsCheckpoint(model_of("llama")[0])
    with (
        pytest.raises(ConfigError, match="toy models are not split with --quantize"),
        narrowed(ToyTextBackend(), whole, "int8", tmp_path),
    ):
        pytest.fail("nothing was refused")
