"""What announcements on the network may say, and what is made of others'."""

from __future__ import annotations

import pytest

from cake_core.cluster.discovery import SERVICE, Found, _own_addresses, _parse, announce
from cake_core.transport import Address


def test_an_announcement_becomes_addresses() -> None:
    found = _parse(f"w.{SERVICE}", 10128, ["fe80::1", "fd00::2", "192.168.1.5"], {b"node": b"laptop", b"scheme": b"quic"})
    assert found == Found("laptop", (Address("192.168.1.5", 10128, "quic"), Address("fd00::2", 10128, "quic")))
    assert _parse(f"w.{SERVICE}", 1, ["10.0.0.1"], {}) == Found("w", (Address("10.0.0.1", 1),))


@pytest.mark.parametrize(
    ("port", "addresses", "properties"),
    [
        (0, ["10.0.0.1"], {}),
        (70000, ["10.0.0.1"], {}),
        (1, [], {}),
        (1, ["fe80::1"], {}),
        (1, ["10.0.0.1"], {b"node": b"\x1b[2Jx"}),
        (1, ["10.0.0.1"], {b"scheme": b"tcp://evil"}),
    ],
)
def test_announcements_that_make_no_sense_are_dropped(port: int, addresses: list[str], properties: dict[bytes, bytes]) -> None:
    assert _parse(f"w.{SERVICE}", port, addresses, properties) is None


def test_only_addresses_that_others_reach_are_announced() -> None:
    assert _own_addresses("127.0.0.1") == []
    assert _own_addresses("localhost") == []
    assert _own_addresses("192.168.1.5") == ["192.168.1.5"]
    assert not [text for text in _own_addresses("::") if text.startswith("127.")]
    assert announce("w", Address("127.0.0.1", 1)) is None
