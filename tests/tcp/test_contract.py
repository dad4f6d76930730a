"""The TCP transport through the kit: plain and encrypted, over IPv6, and on a system without `sendmsg` and `poll`."""

from __future__ import annotations

import select
import socket

import pytest

from cake_core.security import make_identity
from cake_core.testing.contracts import TransportContract
from cake_core.transport import Address
from cake_transport_tcp.transport import TcpTransport


def missing(sock):
    raise AttributeError("this system has no sendmsg")


class TestTcp(TransportContract):
    @pytest.fixture
    def transport(self):
        return TcpTransport()

    @pytest.fixture
    def address(self):
        return Address("127.0.0.1", 0)


class TestTcpWithTls(TestTcp):
    @pytest.fixture
    def new_identity(self):
        return make_identity


class TestTcpOverIPv6(TestTcp):
    largest = 1024 * 1024

    @pytest.fixture
    def address(self):
        return Address("::1", 0)


class TestTcpWithoutSendmsgAndPoll(TestTcp):
    """What Windows lacks."""

    largest = 4 * 1024 * 1024

    @pytest.fixture(autouse=True)
    def windows(self, monkeypatch):
        monkeypatch.setattr(socket.socket, "sendmsg", property(missing), raising=False)
        monkeypatch.delattr(select, "poll")
        monkeypatch.delattr(select, "POLLRDHUP", raising=False)
