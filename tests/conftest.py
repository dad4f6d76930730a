"""Property tests are the same on every run; `HYPOTHESIS_PROFILE=fuzz` searches further."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.register_profile(
    "fuzz", max_examples=10_000, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it puts into the background so, and the processes that tests start would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests look for workers only where they say so, never on the network they happen to run in.
os.environ.setdefault("CAKE_WORKERS", "none")


@pytest.fixture(autouse=True)
def _no_handler_stays() -> Iterator[None]:
    """A command that a test runs in this process logs to stderr as commands do; later tests are quiet again."""
    yield
    root = logging.getLogger()
    for handler in [h for h in root.handlers if type(h).__module__.startswith("cake_")]:
        root.removeHandler(handler)
