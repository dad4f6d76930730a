"""How channels and listeners end: in order, at once, by a deadline, from either side and in the middle of anything."""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller

import pytest

from cake_core.errors import ChannelClosed, DeadlineExceeded
from cake_core.testing.contracts.threads import PATIENCE, Task
from cake_core.testing.contracts.transport_rig import MIB, Ends, TransportRig, anything, connect, receive, send
from cake_core.transport import Channel, Identity, Listener, Transport

SHORT = 0.2
End = Callable[[Channel], None]
ENDINGS = [pytest.param(methodcaller(name), id=name) for name in ("close", "abort")]


def send_until_closed(channel: Channel) -> None:
    """Sends until ChannelClosed: it may take a few messages until the other end's word has come."""
    for _ in range(100_000):
        channel.send(b"m", [bytes(1024)], PATIENCE)


class ChannelEndings(TransportRig):
    def test_what_was_sent_before_close_arrives(self, ends: Ends) -> None:
        def write() -> None:
            for index in range(20):
                send(ends.a, b"%d" % index, bytes(100_000))
            ends.a.close()

        sending = Task(write)
        assert [receive(ends.b)[0] for _ in range(20)] == [b"%d" % i for i in range(20)]
        sending.result()
        with pytest.raises(ChannelClosed):
            receive(ends.b)

    @pytest.mark.parametrize("end", ENDINGS)
    def test_ending_wakes_both_receivers(self, ends: Ends, end: End) -> None:
        waiting = [Task(lambda c=channel: receive(c)) for channel in (ends.a, ends.b)]  # type: ignore[misc]
        assert all(task.running(SHORT) for task in waiting)
        end(ends.a)
        for task in waiting:
            with pytest.raises(ChannelClosed):
                task.result()

    @pytest.mark.parametrize("end", ENDINGS)
    def test_nothing_works_after_the_end_and_ending_again_is_fine(self, ends: Ends, end: End) -> None:
        end(ends.a)
        for channel in (ends.a, ends.b):
            with pytest.raises(ChannelClosed):
                receive(channel)
            with pytest.raises(ChannelClosed):
                send_until_closed(channel)
        for channel in (ends.a, ends.b):
            channel.close()
            channel.abort()
            channel.close()

    @pytest.mark.parametrize("end", ENDINGS)
    @pytest.mark.parametrize("ender", ["writer", "reader"])
    def test_ending_wakes_a_writer_that_is_held_back(self, ends: Ends, end: End, ender: str) -> None:
        def write() -> None:
            while True:
                ends.a.send(b"m", [bytes(MIB)], PATIENCE)

        writing = Task(write)
        assert writing.running(SHORT)
        # A writer's own close has to wait for nobody either: what `send` has not returned from need not arrive.
        end(ends.a if ender == "writer" else ends.b)
        with pytest.raises(ChannelClosed):
            writing.result()

    def test_half_a_message_is_never_received(self, ends: Ends) -> None:
        """The writer goes away while a body is under way."""
        writing = Task(lambda: ends.a.send(b"m", [bytes(MIB)] * 256, PATIENCE))

        def allocate(header: bytes, length: int) -> memoryview:
            ends.a.abort()
            return anything(header, length)

        with pytest.raises(ChannelClosed):
            ends.b.receive(allocate, PATIENCE)
        with pytest.raises(ChannelClosed):
            writing.result()

    @pytest.mark.parametrize("timeout", [0.0, 0.05])
    def test_a_receive_that_times_out_loses_nothing(self, ends: Ends, timeout: float) -> None:
        for index in range(5):
            with pytest.raises(DeadlineExceeded):
                ends.b.receive(anything, timeout)
            send(ends.a, b"%d" % index, b"body")
            assert receive(ends.b) == (b"%d" % index, b"body")
            send(ends.b, b"back")
            assert receive(ends.a) == (b"back", b"")

    def test_a_send_that_times_out_ends_the_channel(self, ends: Ends) -> None:
        with pytest.raises(DeadlineExceeded):
            ends.a.send(b"m", [bytes(MIB)] * 256, SHORT)
        with pytest.raises(ChannelClosed):
            send(ends.a, b"next")
        with pytest.raises(ChannelClosed):
            receive(ends.b)

    def test_a_listener_ends_and_its_channels_live_on(
        self, transport: Transport, listener: Listener, identity: Identity | None
    ) -> None:
        dialled, accepted = connect(transport, listener, identity)
        accepting = Task(lambda: listener.accept(PATIENCE))
        assert accepting.running(SHORT)
        listener.close()
        with pytest.raises(ChannelClosed):
            accepting.result()
        with pytest.raises(ChannelClosed):
            listener.accept(SHORT)
        listener.close()
        send(dialled, b"still", b"here")
        assert receive(accepted) == (b"still", b"here")
        dialled.abort()
        accepted.abort()

    def test_accept_has_a_deadline(self, listener: Listener) -> None:
        with pytest.raises(DeadlineExceeded):
            listener.accept(0.05)
