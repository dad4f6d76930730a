"""Bare workers as processes: shared, killed in the middle of an answer, and never missed in the text."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cake_core.testing.toys import write_toy_checkpoint

pytest.importorskip("cake_transport_tcp", reason="workers meet over TCP")

ASK = ["cake", "run", "--model", "toy", "--seed", "7", "--max-tokens", "120", "tell me"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="ends a process at once")
def test_a_worker_is_killed_and_its_layers_go_to_the_other(
    spawn: Callable[..., Any], home: dict[str, str], free_address: Callable[[], str], tmp_path: Path
) -> None:
    write_toy_checkpoint(tmp_path / "toy", layers=6, seconds_per_batch=0.02)
    env = {**home, "CAKE_CLUSTER_KEY": "ab" * 32}
    alone = subprocess.run(ASK, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=True).stdout

    workers, addresses = [], [free_address(), free_address()]
    for name, address in zip("ab", addresses, strict=True):
        cache = {"CAKE_CACHE_DIR": str(tmp_path / name)}
        workers.append(spawn(["cake", "worker", "--name", name, "--address", address], {**env, **cache}))
        workers[-1].wait_for("listening on")
    command = [*ASK, "--workers", ",".join(addresses), "--spread", "--on-loss", "replan"]
    master = spawn(f"{shlex.join(command)} > answer.txt", env)  # what it says meanwhile comes in between otherwise
    workers[1].wait_for("serving model.layers")
    master.wait_for("seed 7")
    os.killpg(workers[1].popen.pid, signal.SIGKILL)
    assert master.wait() == 0, master.output
    assert "placing the layers of b on other nodes" in master.output
    assert (tmp_path / "answer.txt").read_text() == alone
