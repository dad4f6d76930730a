"""cake-llama through the contract kit, as a third party's backend would be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from tests.llama.oracle_rig import Oracle

from cake_core.checkpoint import Checkpoint, SafetensorsCheckpoint
from cake_core.testing.contracts import TextBackendContract
from cake_llama.backend import LlamaBackend


class TestLlama(TextBackendContract):
    case: ClassVar[str] = "llama-tied"
    texts = ()  # the tiny checkpoints have no tokenizer; test_tokenizer.py looks at those of the families

    @pytest.fixture
    def backend(self) -> LlamaBackend:
        return LlamaBackend()

    @pytest.fixture
    def checkpoint(self, model_of: Callable[[str], tuple[Path, Oracle]]) -> SafetensorsCheckpoint:
        folder, self._oracle = model_of(self.case)
        return SafetensorsCheckpoint(folder)

    def raw_logits(self, checkpoint: Checkpoint, tokens: Sequence[int]) -> Sequence[float]:
        logits: list[float] = self._oracle.logits(tokens)[-1].tolist()
        return logits


class TestQwen(TestLlama):
    """Windows in some layers, biases, and a head of its own."""

    case = "qwen2-window"


class TestPhi(TestLlama):
    """Angles that depend on the length of the prompt."""

    case = "phi3-longrope"
