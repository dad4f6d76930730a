"""Tiny checkpoints, written once a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tests.llama.oracle_rig import CASES, Oracle, write_checkpoint


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny products: a second thread only waits
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Oracle]]:
    """The checkpoint of a case and its oracle."""
    made: dict[str, tuple[Path, Oracle]] = {}

    def model_of(name: str) -> tuple[Path, Oracle]:
        if name not in made:
            folder = write_checkpoint(tmp_path_factory.mktemp(name), CASES[name])
            made[name] = folder, Oracle(folder)
        return made[name]

    return model_of


@pytest.fixture
def block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the model's own code serve, which cake-kernels, where it is installed, does not need."""
    if find_spec("cake_kernels") is not None:
        from cake_llama.cpu import decoder

        monkeypatch.setattr(decoder, "make_decoder", lambda *_: None)
