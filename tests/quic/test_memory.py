"""However large a body is and however slow its reader, it is nowhere but in the writer's buffer and the reader's."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from cake_core.security import make_identity
from cake_core.testing.contracts.threads import Task
from cake_core.testing.contracts.transport_rig import connect
from cake_core.transport import Address

pytest.importorskip("qh3")
MIB = 1024 * 1024
BODY = 256 * MIB
FLAT = 64 * MIB
PATIENCE = 120.0
STATM = Path("/proc/self/statm")
pytestmark = [pytest.mark.full, pytest.mark.skipif(not STATM.exists(), reason="reads /proc")]


def resident() -> int:
    return int(STATM.read_text().split()[1]) * 4096


class Peak:
    """The most memory this process has had since it began to watch, sampled."""

    def __enter__(self) -> Peak:
        self.before = self.most = resident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self.most = max(self.most, resident())

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def more(self) -> int:
        return self.most - self.before


@pytest.mark.timeout(300)
@pytest.mark.parametrize("encrypted", [True, False])
def test_memory_is_flat_while_the_largest_body_waits_and_while_it_is_read(encrypted: bool) -> None:
    from cake_transport_quic.transport import QuicTransport

    transport, identity = QuicTransport(), make_identity() if encrypted else None
    listener = transport.listen(Address("127.0.0.1", 0, "quic"), identity)
    dialled, accepted = connect(transport, listener, identity)
    body, into = bytearray(b"\x5a" * BODY), bytearray(b"\xa5" * BODY)
    try:
        with Peak() as peak:
            sending = Task(lambda: accepted.send(b"large", [body], PATIENCE))
            time.sleep(1.0)  # nobody reads
            waiting = peak.more
            header, _ = dialled.receive(lambda header, length: memoryview(into)[:length], PATIENCE)
            sending.result()
        assert header == b"large"
        assert into == body
        assert max(waiting, peak.more) < FLAT, f"{waiting / MIB:.0f} MiB more while it waited, {peak.more / MIB:.0f} in all"
    finally:
        dialled.abort()
        accepted.abort()
        listener.close()
