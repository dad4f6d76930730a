"""A fresh process imports nothing heavy before a backend is warmed, and everything that loading needs then; a worker that
waits for a master is warmed meanwhile."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cake_core.testing.toys import ToyTextBackend
from cake_core.warming import IDLE, Warming

PROGRAM = """
import sys
from cake_core.plugins import Plugins
from cake_core.warming import Warmable, Warming

backend = Plugins().backends[sys.argv[1]]
assert isinstance(backend, Warmable)
assert not set(sys.argv[2:]) & sys.modules.keys()
Warming([backend]).wait()
print(*(name for name in sys.argv[2:] if name in sys.modules))
"""


@pytest.mark.parametrize(
    ("backend", "modules"),
    [
        ("llama", ["torch", "cake_llama.loading", "cake_llama.stage"]),
        pytest.param("sd", ["torch", "diffusers", "cake_sd.loading"], marks=pytest.mark.full),
    ],
)
def test_warming_imports_what_loading_needs(backend: str, modules: list[str]) -> None:
    pytest.importorskip(f"cake_{backend}")
    command = [sys.executable, "-c", PROGRAM, backend, *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == modules


@pytest.mark.parametrize("busy", [False, True])
def test_a_backend_is_warmed_unless_there_is_work_by_then(busy: bool) -> None:
    happened: list[float] = []

    class Backend(ToyTextBackend):
        def warm(self) -> None:
            happened.append(0.0)

    Warming([Backend()], lambda seconds: happened.append(seconds) or busy).wait()
    assert happened == ([IDLE] if busy else [IDLE, 0.0])
