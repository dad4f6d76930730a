"""The clusters of these tests speak over memory; CAKE_TEST_TRANSPORT=tcp or quic has the same tests speak over a network."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.core.farm import Farm

from cake_core.cluster import replan
from cake_core.transport import Transport

TRANSPORTS = {
    "memory": "cake_core.testing.memory:MemoryTransport",
    "tcp": "cake_transport_tcp.transport:TcpTransport",
    "quic": "cake_transport_quic.transport:QuicTransport",
}


@pytest.fixture
def transport() -> Transport:
    module, _, name = TRANSPORTS[os.environ.get("CAKE_TEST_TRANSPORT", "memory")].partition(":")
    made: Transport = getattr(importlib.import_module(module), name)()
    return made


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    made = Farm(tmp_path / "homes")
    yield made
    made.close()


@pytest.fixture
def soon_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost nodes are taken for lost sooner; requests wait for longer than any of this takes on a busy machine."""
    monkeypatch.setattr(replan, "GRACE", 0.2)
