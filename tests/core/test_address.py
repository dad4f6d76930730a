from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cake_core.errors import ConfigError
from cake_core.transport import Address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("host", Address("host", 10128, "tcp")),
        ("host:1", Address("host", 1, "tcp")),
        (" 10.0.0.1:65535/ ", Address("10.0.0.1", 65535, "tcp")),
        ("quic://host", Address("host", 10128, "quic")),
        ("memory://a:7", Address("a", 7, "memory")),
        ("[::1]", Address("::1", 10128, "tcp")),
        ("[fe80::1%eth0]:99", Address("fe80::1%eth0", 99, "tcp")),
        ("tcp://[::]:0", Address("::", 0, "tcp")),
    ],
)
def test_parses(text, address):
    assert Address.parse(text) == address
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not an address"),
        (":80", "not an address"),
        ("tcp://", "not an address"),
        ("://host", "not an address"),
        ("::1", "put an IPv6 address in brackets"),
        ("[::1", "missing ']'"),
        ("host:port", "'port' is not a port"),
        ("host:65536", "up to 65535"),
        ("host:-1", "is not a port"),
        ("host:\uff11\uff12", "is not a port"),
    ],
)
def test_says_what_is_wrong(text, message):
    with pytest.raises(ConfigError, match=message):
        Address.parse(text)


@given(st.text(max_size=20))
def test_anything_is_an_address_or_a_config_error(text):
    try:
        address = Address.parse(text)
    except ConfigError:
        return
    assert 0 <= address.port < 65536
    assert address.host
