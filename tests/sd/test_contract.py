"""cake-sd through core's own contract kit, with the emoji model."""

from __future__ import annotations

from pathlib import Path

import pytest

from cake_core.checkpoint import Checkpoint
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.model import ImageBackend
from cake_core.testing.contracts import ImageBackendContract
from cake_sd.backend import SdBackend

EMOJI = Path(__file__).parents[2] / "plugins/cake_emoji/src/cake_emoji/model"


class TestStableDiffusion(ImageBackendContract):
    @pytest.fixture
    def backend(self) -> ImageBackend:
        return SdBackend()

    @pytest.fixture
    def checkpoint(self) -> Checkpoint:
        return DiffusersCheckpoint(EMOJI)
