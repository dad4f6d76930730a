"""The whole test suite of `cake-markov`."""

from __future__ import annotations

import json
from array import array

import pytest
from cake_markov.backend import WIDTH, MarkovBackend

from cake_core.checkpoint import SafetensorsCheckpoint
from cake_core.plugins import Plugins
from cake_core.sampling import uniform
from cake_core.testing.contracts import TextBackendContract
from cake_core.testing.toy_checkpoint import VOCABULARY, write_safetensors


class TestMarkov(TextBackendContract):
    @pytest.fixture
    def backend(self):
        return MarkovBackend()

    @pytest.fixture
    def checkpoint(self, tmp_path):
        rows = {
            "model.embed_tokens": VOCABULARY,
            "model.layers.0": 1,
            "model.layers.1": 1,
            "model.norm": 1,
            "lm_head": VOCABULARY,
        }
        tensors = {}
        for number, (name, count) in enumerate(rows.items()):
            values = array("f", (4 * uniform(number, 0, index) - 2 for index in range(count * WIDTH)))
            if name.startswith("model.layers."):
                values = array("f", (0.4 + value / 10 for value in values))
            tensors[f"{name}.weight"] = ("F32", (count, WIDTH), values.tobytes())
        write_safetensors(tmp_path / "model.safetensors", tensors)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "markov", "num_hidden_layers": 2}))
        return SafetensorsCheckpoint(tmp_path)


def test_registers():
    from cake_markov import hooks

    plugins = Plugins(())
    plugins.register("markov", hooks)
    assert "markov" in plugins.backends
