"""The QUIC transport through the kit."""

from __future__ import annotations

import pytest

from cake_core.security import make_identity
from cake_core.testing.contracts import TransportContract
from cake_core.transport import Address

pytest.importorskip("qh3")


class TestQuic(TransportContract):
    largest = 16 * 1024 * 1024

    @pytest.fixture
    def transport(self):
        from cake_transport_quic.transport import QuicTransport

        return QuicTransport()

    @pytest.fixture
    def address(self):
        return Address("127.0.0.1", 0, "quic")

    @pytest.fixture
    def new_identity(self):
        return make_identity


class TestQuicInsecure(TestQuic):
    largest = 1024 * 1024

    @pytest.fixture
    def new_identity(self):
        return None
