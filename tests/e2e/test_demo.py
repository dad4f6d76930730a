"""The demo, on toy models: what it shows, and that it leaves no process behind."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cake_transport_tcp", reason="the demo's processes meet over TCP")

DEMO = [sys.executable, str(Path(__file__).parents[2] / "tools" / "demo.py"), "--model", "toy", "--image-model", "toy-image"]


def left_behind(output: str) -> list[str]:
    """Command lines of processes that still use one of the demo's addresses."""
    addresses = re.findall(r"127\.0\.0\.1:\d+", output)
    assert addresses
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True, timeout=20).stdout
    return [line for line in listing.splitlines() if any(address in line for address in addresses)]


def test_it_answers_and_paints(spawn: Callable[..., Any]) -> None:
    demo = spawn([*DEMO, "--max-tokens", "20"])
    assert demo.wait() == 0, demo.output
    for shown in ("left", "right", "model.layers.0-1", "time to first token", "painter", "unet", "wrote"):
        assert shown in demo.output
    assert not left_behind(demo.output)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_leaves_nothing_when_interrupted(spawn: Callable[..., Any], number: int) -> None:
    demo = spawn([*DEMO, "--max-tokens", "4000"])
    demo.wait_for("listening on")
    demo.popen.send_signal(number)
    time.sleep(0.05)
    # What a terminal and a runner do: the signal comes twice.
    demo.popen.send_signal(number)
    assert demo.wait() == 130, demo.output
    assert not left_behind(demo.output)
