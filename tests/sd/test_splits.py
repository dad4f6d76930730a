"""Every family, cut in every way over a master and three worker processes that masters assign their components to over TCP.

There are over 600 cases; a run takes some of each family, and all with CAKE_TEST_SPLITS=all (about half an hour).
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
from tests.sd.processes import Worker, master, plugins_over_tcp
from tests.sd.test_cluster import FAMILIES, paint
from tests.sd.test_oracle import WITH_IMG2IMG, call_of, image_and_png, request_for

from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.model import LoadOptions

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600 if os.environ.get("CAKE_TEST_SPLITS") == "all" else 240)]

NODES = ("master", "w0", "w1", "w2")
SAMPLE = 2
"""Splits of each family and dtype in an ordinary run."""


def splits(count: int) -> list[tuple[int, ...]]:
    """The node of each of `count` components, 0 the master; workers are interchangeable, so new ones come in order."""
    found: list[tuple[int, ...]] = [()]
    for _ in range(count):
        found = [(*split, node) for split in found for node in range(min(max((0, *split)) + 2, len(NODES)))]
    return [split for split in found if any(split)]


def test_splits_are_all_there_are() -> None:
    assert splits(1) == [(1,)]
    assert splits(2) == [(0, 1), (1, 0), (1, 1), (1, 2)]
    assert [len(splits(count)) for count in (3, 4, 5)] == [14, 50, 186]  # partitions into up to four parts, less the whole


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Worker]]:
    """Three machines without a model, each with a home and a cache of its own."""
    started = {name: Worker(tmp_path_factory.mktemp(name), name) for name in NODES[1:]}
    yield started
    for worker in started.values():
        worker.end()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_split_over_processes_paints_what_diffusers_does(
    kit: Any, model: Any, workers: dict[str, Worker], family: str, dtype: str
) -> None:
    folder = model(family)
    described = plugins_over_tcp().backends["sd"].describe(DiffusersCheckpoint(folder), LoadOptions(dtype=dtype, device="cpu"))
    names = [layer.name for layer in described.layers]
    jobs = [(request_for(family), kit.pictures(kit.plain(folder, dtype), 7, width=64, height=48, **call_of(family)))]
    if family in WITH_IMG2IMG:
        image, data = image_and_png()
        size = {"width": 64, "height": 48} if family in ("flux", "sd3") else {}
        pipeline = kit.image_to_image(kit.plain(folder, dtype))
        expected = kit.pictures(pipeline, 7, image=image, strength=0.7, **size, **call_of(family))
        jobs.append((request_for(family, init_image=data, strength=0.7), expected))
    chosen = splits(len(names))
    if os.environ.get("CAKE_TEST_SPLITS") != "all":
        chosen = random.Random(f"{family} {dtype}").sample(chosen, SAMPLE)
    for split in chosen:
        layers = {node: [name for name, at in zip(names, split, strict=True) if NODES[at] == node] for node in NODES[1:]}
        entries = {
            node: {"host": f"127.0.0.1:{workers[node].port}", "layers": found} for node, found in layers.items() if found
        }
        with master(folder, entries, dtype) as runtime:
            for request, expected in jobs:
                assert paint(runtime, request) == expected, f"split {layers}"
