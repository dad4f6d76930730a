"""What `cake bench text` reports of a cluster: every stage, wherever it is, and the guesses."""

from __future__ import annotations

from pathlib import Path

import pytest

from cake_core.bench import Load, bench_text
from cake_core.cli.bench import _table
from cake_core.cluster.chain import Way
from cake_core.engine.speculation import Speculation
from cake_core.plugins import Plugins
from cake_core.testing.cluster import LocalCluster
from cake_core.testing.memory import MemoryTransport
from cake_core.testing.toys import write_toy_checkpoint


@pytest.mark.parametrize(("route", "ways"), [("star", ["w0", "w1"]), ("chain", ["w0 -> w1"])])
def test_every_stage_and_wire_is_accounted_for(tmp_path: Path, route: Way, ways: list[str]) -> None:
    plugins, draft = Plugins(entries=()), write_toy_checkpoint(tmp_path / "draft")
    checkpoint = write_toy_checkpoint(tmp_path / "toy", seconds_per_batch=0.005)  # or guesses might not seem worth their while
    cut = {"w0": ["model.layers.0"], "w1": ["model.layers.1-2"]}
    with LocalCluster(plugins, checkpoint, MemoryTransport(), cut) as cluster:
        runtime = cluster.open_text(speculation=Speculation(4, everywhere=True), draft=draft, route=route)
        report = bench_text(runtime, Load(prompt_tokens=20, tokens=12, runs=2))
    stages = report["stages"]
    assert [stage["node"] for stage in stages] == ["master", "w0", "w1", "master"]
    assert stages[3]["layers"] == "model.layers.3, model.norm, lm_head"
    assert all(stage["seconds_per_batch"] > 0 and 0 <= stage["idle"] <= 1 for stage in stages)
    total = sum(stage["seconds_per_token"] for stage in stages) * 2 * 12
    assert total == pytest.approx(sum((1 - stage["idle"]) * report["wall_seconds"] for stage in stages), rel=1e-6)
    assert 0 < report["guesses"]["accepted"] == report["guesses"]["proposed"]
    legs = report["legs"]
    assert [leg["way"] for leg in legs] == ways
    away, wires = (sum(leg[kind] for leg in legs) for kind in ("seconds_per_token", "wire_seconds_per_token"))
    assert 0 < wires == pytest.approx(away - stages[1]["seconds_per_token"] - stages[2]["seconds_per_token"])
    table = _table(report)
    assert table.count("wires and waiting") == len(ways)
    assert "right of" in table
    assert table.count("idle") == 4
