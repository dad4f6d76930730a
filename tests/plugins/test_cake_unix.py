"""The whole test suite of `cake-unix`."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from cake_core.errors import ConfigError
from cake_core.plugins import Plugins
from cake_core.testing.contracts import TransportContract
from cake_core.transport import Address, Identity

if sys.platform == "win32":
    pytest.skip("Python has no Unix sockets on Windows", allow_module_level=True)

from cake_unix.transport import UnixTransport


class TestUnix(TransportContract):
    most_in_flight = 4 * 1024 * 1024

    @pytest.fixture
    def transport(self):
        # Not tmp_path: a Unix socket's path has at most 108 bytes.
        folder = Path(tempfile.mkdtemp(prefix="cake"))
        yield UnixTransport(folder)
        shutil.rmtree(folder)

    @pytest.fixture
    def address(self):
        return Address("here", 0, "unix")


def test_does_not_pretend_to_encrypt():
    with pytest.raises(ConfigError, match="--insecure"):
        UnixTransport().dial(Address("here", 1, "unix"), Identity(b"", b""), 1)


def test_registers():
    from cake_unix import hooks

    plugins = Plugins(())
    plugins.register("unix", hooks)
    assert "unix" in plugins.transports
