"""The coverage-guided fuzzer, for a moment each (longer with CAKE_FUZZ_RUNS and CAKE_FUZZ_SECONDS)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.fuzz.targets import TARGETS

pytest.importorskip("atheris")
ROOT = Path(__file__).parents[2]


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", TARGETS)
def test_a_run_finds_nothing(name, tmp_path):
    for path in (ROOT / "tests/fuzz/corpus").glob(f"{name}-*.bin"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    runs = os.environ.get("CAKE_FUZZ_RUNS", "50000")
    limits = [f"-runs={runs}", f"-max_total_time={os.environ.get('CAKE_FUZZ_SECONDS', '60')}", "-max_len=8192"]
    command = [sys.executable, "-m", "tests.fuzz.coverage_guided", name, *limits, str(tmp_path)]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=3500)
    assert done.returncode == 0, done.stderr[-3000:]
