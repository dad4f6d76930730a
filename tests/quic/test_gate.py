"""Who is not let in over QUIC, and what both ends are told."""

from __future__ import annotations

import time

import cbor2
import pytest

from cake_core import security
from cake_core.errors import CakeError, NodeMismatch, TransportError
from cake_core.security import hello
from cake_core.security.keys import ClusterKey
from cake_core.transport import Address
from cake_transport_quic import library
from cake_transport_quic.transport import QuicTransport

ANYWHERE = Address("127.0.0.1", 0, "quic")
KEY, OTHER = ClusterKey(b"k" * 32), ClusterKey(b"o" * 32)
PATIENCE = 10.0
REMEDIES = {
    "another key": (KEY, OTHER, "cake key join", "cake key show"),
    "a dialler with --insecure": (KEY, None, "--insecure", "runs with --insecure and this end does not"),
    "a listener with --insecure": (None, KEY, "--insecure", "start this end without --insecure"),
}


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if found := [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]:
            return found
        time.sleep(0.02)
    return []


@pytest.mark.parametrize("case", REMEDIES)
def test_both_ends_name_the_address_and_the_remedy(case: str, caplog: pytest.LogCaptureFixture) -> None:
    inside, outside, told, logged = REMEDIES[case]
    gate = security.listen(QuicTransport(), ANYWHERE, inside, hello.make_hello("w"))
    with pytest.raises(CakeError, match=rf"{gate.address}.*{told}"):
        security.dial(QuicTransport(), gate.address, outside, hello.make_hello(), PATIENCE)
    (line,) = refusals(caplog)
    gate.close()
    assert f"refused a connection to {gate.address}: 127.0.0.1:" in line
    assert logged in line


def test_another_version_is_told_on_both_ends(caplog: pytest.LogCaptureFixture) -> None:
    gate = security.listen(QuicTransport(), ANYWHERE, KEY, hello.make_hello("w"), hello.check_hello)
    newer = cbor2.dumps({"protocol": 99, "cake": "9.9.9", "process": bytes(16)})
    channel, answer = security.dial(QuicTransport(), gate.address, KEY, newer, PATIENCE)
    hello.check_hello(answer, channel.peer)
    (line,) = refusals(caplog)
    channel.close()
    gate.close()
    assert "runs Cake 9.9.9 with protocol 99" in line
    assert "install the same version" in line
    with pytest.raises(NodeMismatch, match="install the same version"):
        hello.check_hello(newer, "peer")


def test_another_program_is_called_that_by_us_and_not_by_the_library(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = security.listen(QuicTransport(), ANYWHERE, KEY, hello.make_hello("w"))
    monkeypatch.setattr(library, "_ALPN", ["h3"])
    with pytest.raises(TransportError, match=f"{gate.address} does not speak Cake's protocol"):
        security.dial(QuicTransport(), gate.address, KEY, hello.make_hello(), PATIENCE)
    gate.close()
    assert not [record for record in caplog.records if not record.name.startswith("cake_")]
