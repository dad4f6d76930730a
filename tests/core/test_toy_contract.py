"""The toys through the contract kit, as a third party's backend would be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cake_core.model import LoadOptions
from cake_core.stages.devices import load_text
from cake_core.testing.contracts import ImageBackendContract, TextBackendContract
from cake_core.testing.toy_layers import START, load_embedding, load_head, load_mixer, load_norm
from cake_core.testing.toys import ToyImageBackend, ToyTextBackend, toy_checkpoint, toy_image_checkpoint, write_toy_checkpoint


class TestToy(TextBackendContract):
    tolerance = 1e-6

    @pytest.fixture
    def backend(self):
        return ToyTextBackend()

    @pytest.fixture
    def checkpoint(self):
        return toy_checkpoint()

    def raw_logits(self, checkpoint, tokens):
        """The toy once more as a plain loop over tokens and layers, without a stage."""
        table, norm, head = load_embedding(checkpoint), load_norm(checkpoint), load_head(checkpoint)
        mixers = [load_mixer(checkpoint, f"model.layers.{index}") for index in range(checkpoint.config["num_hidden_layers"])]
        states = [[START] for _ in mixers]
        for token in tokens:
            vectors = [table[token]]
            for mixer, state in zip(mixers, states, strict=True):
                vectors = mixer.run(vectors, state)
        return head.run(norm.run(vectors[0]))


class TestRecurrentToy(TestToy):
    """Keeps nothing at `truncate`."""

    @pytest.fixture
    def checkpoint(self, tmp_path):
        return write_toy_checkpoint(tmp_path, layers=2, recurrent=True)

    @pytest.fixture
    def options(self):
        return LoadOptions()


class OnDevices(ToyTextBackend):
    """Every run of layers over two devices, or three."""

    name = "toy"

    def load(self, checkpoint, info, layers, options, progress=None):
        devices = "a,b" if len(layers) % 2 else "a,b,c"
        return load_text(ToyTextBackend(), checkpoint, info, layers, replace(options, device=devices), progress)


class TestToyOnDevices(TestToy):
    """A node with several devices serves as one with a single one does."""

    @pytest.fixture
    def backend(self):
        return OnDevices()


class TestRecurrentToyOnDevices(TestRecurrentToy):
    @pytest.fixture
    def backend(self):
        return OnDevices()


class TestToyImage(ImageBackendContract):
    seconds_to_cancel = 1.0

    @pytest.fixture
    def backend(self):
        return ToyImageBackend()

    @pytest.fixture
    def checkpoint(self):
        return toy_image_checkpoint()
