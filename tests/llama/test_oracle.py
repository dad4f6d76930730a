"""Our decoder against transformers: every family and switch, however the prompt is cut and wherever the layers are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from tests.llama.oracle_rig import CASES, LAYERS, TRAINED, Oracle, difference, load_chain, sequence, stage_logits

BOUND = 1e-4
NAMES = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(LAYERS)), "model.norm", "lm_head"]

ModelOf = Callable[[str], tuple[Path, Oracle]]


def cuts() -> list[list[tuple[str, ...]]]:
    """Every cut of the layers into one to four runs."""
    count = len(NAMES)
    edges = [
        [0, *inner, count]
        for inner in (
            [],
            *([a] for a in range(1, count)),
            *([a, b] for a in range(1, count) for b in range(a + 1, count)),
            *([a, b, c] for a in range(1, count) for b in range(a + 1, count) for c in range(b + 1, count)),
        )
    ]
    return [[tuple(NAMES[a:b]) for a, b in pairwise(cut)] for cut in edges]


def pieces_of(length: int, sizes: Sequence[int]) -> list[int]:
    """`sizes` over and over until they make up `length`."""
    found: list[int] = []
    while (left := length - sum(found)) > 0:
        found.append(min(left, sizes[len(found) % len(sizes)]))
    return found


@pytest.fixture(params=["steps in C where they can be", "block by block"])
def _either_way(request: pytest.FixtureRequest) -> None:
    if request.param == "block by block":
        request.getfixturevalue("block_by_block")


@pytest.mark.usefixtures("_either_way")
@pytest.mark.parametrize("name", CASES)
def test_whole_prefill(model_of: ModelOf, name: str) -> None:
    folder, oracle = model_of(name)
    tokens = sequence(CASES[name].length)
    chain = load_chain(folder)
    assert difference(stage_logits(chain, tokens, [len(tokens)]), oracle.logits(tokens)) < BOUND


@pytest.mark.usefixtures("_either_way")
@pytest.mark.parametrize("name", CASES)
def test_chunked_prefill(model_of: ModelOf, name: str) -> None:
    """Chunks of odd lengths, below and above a block, across the window and the trained length."""
    folder, oracle = model_of(name)
    tokens = sequence(CASES[name].length)
    chain = load_chain(folder)
    expected = oracle.logits(tokens)
    for sizes in ([5, 1, 17, 3], [16]):
        assert difference(stage_logits(chain, tokens, pieces_of(len(tokens), sizes)), expected) < BOUND


@pytest.mark.usefixtures("_either_way")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("prompt", [6, TRAINED + 3], ids=["short", "long"])
def test_decode(model_of: ModelOf, name: str, prompt: int) -> None:
    """Token by token past window and trained length, also where the prompt was below them."""
    folder, oracle = model_of(name)
    tokens = sequence(CASES[name].length)
    chain = load_chain(folder)
    found = stage_logits(chain, tokens, [prompt, *[1] * (len(tokens) - prompt)], prompt)
    assert difference(found, oracle.logits(tokens, prompt)) < BOUND


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
def test_every_cut(model_of: ModelOf, name: str, nodes: int) -> None:
    folder, oracle = model_of(name)
    tokens = sequence(TRAINED + 6)
    expected = oracle.logits(tokens)
    for cut in (cut for cut in cuts() if len(cut) == nodes):
        found = stage_logits(load_chain(folder, cut), tokens, [20, len(tokens) - 22, 1, 1], len(tokens))
        assert difference(found, expected) < BOUND, cut
