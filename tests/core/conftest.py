"""The clusters of these tests speak over memory; CAKE_TEST_TRANSPORT=tcp or quic has the same tests speak over a network."""

from __future__ import annotations

import importlib
import os

import pytest

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
