"""`TransportContract`: what every transport must do. How channels end is in `transport_endings`."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import ClassVar

import pytest

from cake_core.errors import ChannelClosed, ConfigError, DeadlineExceeded, NodeUnreachable, ProtocolError
from cake_core.testing.contracts.threads import PATIENCE, Task, settle
from cake_core.testing.contracts.transport_endings import ChannelEndings
from cake_core.testing.contracts.transport_rig import (
    MIB,
    Ends,
    NewIdentity,
    anything,
    connect,
    drain,
    receive,
    send,
    stream,
)
from cake_core.transport import MAX_BODY, MAX_HEADER, TRANSPORT_API, Address, Identity, Listener, Transport

PATTERN = bytes(range(251)) * 4178  # a little over 1 MiB, and no power of two


class TransportContract(ChannelEndings):
    """Every test runs over loopback or in memory, in both directions where that can matter.

    Fixtures to give: `transport`, `address` (port 0), and `new_identity` to run everything encrypted.

    Attributes:
        largest: bytes of the largest body to send; the contract's own limit is MAX_BODY.
        most_in_flight: bytes that `send` may have returned from while nobody reads.
        channels: how many are open at once in the test of many.
    """

    largest: ClassVar[int] = 256 * MIB
    most_in_flight: ClassVar[int] = 64 * MIB
    channels: ClassVar[int] = 100

    def test_states_its_contract(self, transport: Transport, address: Address) -> None:
        assert isinstance(transport, Transport)
        assert transport.api == TRANSPORT_API
        assert transport.scheme == address.scheme

    @pytest.mark.parametrize("size", [0, 1, 7, 4096, 65535, 65536, 65537, len(PATTERN)])
    def test_a_message_arrives_as_it_was_sent(self, ends: Ends, size: int) -> None:
        sending = Task(lambda: send(ends.a, b"header", PATTERN[:size]))
        assert receive(ends.b) == (b"header", PATTERN[:size])
        sending.result()

    @pytest.mark.parametrize("size", [1, 255, 256, MAX_HEADER])
    def test_headers_of_every_size(self, ends: Ends, size: int) -> None:
        sending = Task(lambda: send(ends.a, PATTERN[:size], b"body"))
        assert receive(ends.b) == (PATTERN[:size], b"body")
        sending.result()

    def test_a_body_is_its_buffers_one_after_another(self, ends: Ends) -> None:
        send(ends.a, b"h", b"ab", bytearray(b"cd"), b"", memoryview(b"xefx")[1:3], memoryview(bytearray(b"gh")).cast("H"))
        assert receive(ends.b) == (b"h", b"abcdefgh")

    def test_a_large_body(self, ends: Ends) -> None:
        pieces = [PATTERN] * (self.largest // len(PATTERN)) + [PATTERN[: self.largest % len(PATTERN)]]
        sending = Task(lambda: ends.a.send(b"large", pieces, 4 * PATIENCE))
        header, body = ends.b.receive(anything, PATIENCE)
        sending.result()
        assert (header, body.nbytes) == (b"large", self.largest)
        # Compared a piece at a time: the whole once more would need the memory twice.
        assert all(
            body[start : start + len(PATTERN)] == PATTERN[: self.largest - start]
            for start in range(0, self.largest, len(PATTERN))
        )

    def test_messages_keep_their_order(self, ends: Ends) -> None:
        def write() -> None:
            for index in range(500):
                send(ends.a, b"%d" % index, PATTERN[: index * 97 % 5000])

        sending = Task(write)
        assert [receive(ends.b) for _ in range(500)] == [(b"%d" % i, PATTERN[: i * 97 % 5000]) for i in range(500)]
        sending.result()

    def test_both_ways_at_once(self, ends: Ends) -> None:
        tasks = [Task(lambda c=channel: stream(c, 32, [PATTERN])) for channel in (ends.a, ends.b)]  # type: ignore[misc]
        readers = [Task(lambda c=channel: drain(c, 32)) for channel in (ends.a, ends.b)]  # type: ignore[misc]
        expected = [b"%d" % i for i in range(32)]
        assert [reader.result() for reader in readers] == [expected, expected]
        for task in tasks:
            task.result()

    def test_messages_of_several_writers_never_mix(self, ends: Ends) -> None:
        def write(writer: int) -> None:
            for index in range(20):
                send(ends.a, b"%d %d" % (writer, index), bytes((writer,)) * 50_000, bytes((writer,)) * 50_000)

        writers = [Task(lambda w=writer: write(w)) for writer in range(8)]  # type: ignore[misc]
        found: dict[int, list[int]] = {}
        for _ in range(8 * 20):
            header, body = receive(ends.b)
            writer, index = map(int, header.split())
            assert body == bytes((writer,)) * 100_000
            found.setdefault(writer, []).append(index)
        assert found == {writer: list(range(20)) for writer in range(8)}
        for task in writers:
            task.result()

    def test_a_slow_reader_holds_its_writer_back(self, ends: Ends) -> None:
        sent = 0

        def write() -> None:
            nonlocal sent
            for _ in range(2 * self.most_in_flight // len(PATTERN)):
                ends.a.send(b"m", [PATTERN], 4 * PATIENCE)
                sent += 1

        writing = Task(write)
        assert settle(lambda: sent) * len(PATTERN) <= self.most_in_flight
        assert all(receive(ends.b) == (b"m", PATTERN) for _ in range(2 * self.most_in_flight // len(PATTERN)))
        writing.result()

    def test_the_body_lands_in_the_memory_that_was_handed_out(self, ends: Ends) -> None:
        memory = bytearray(9)
        asked: list[tuple[bytes, int]] = []

        def allocate(header: bytes, length: int) -> memoryview:
            asked.append((header, length))
            return memoryview(memory)[2:7]

        send(ends.a, b"header", b"hello")
        header, body = ends.b.receive(allocate, PATIENCE)
        assert asked == [(b"header", 5)]
        assert (header, bytes(body), bytes(memory)) == (b"header", b"hello", b"\0\0hello\0\0")

    def test_no_memory_is_asked_for_an_empty_body(self, ends: Ends) -> None:
        def refuse(header: bytes, length: int) -> memoryview:
            raise ProtocolError("nothing to allocate")

        send(ends.a, b"h", b"", b"")
        header, body = ends.b.receive(refuse, PATIENCE)
        assert (header, body.nbytes) == (b"h", 0)

    def test_a_refused_body_ends_the_channel(self, ends: Ends) -> None:
        def refuse(header: bytes, length: int) -> memoryview:
            raise ProtocolError(f"{length} bytes are too many")

        sending = Task(lambda: send(ends.a, b"h", b"0123"))
        with pytest.raises(ProtocolError, match="4 bytes are too many"):
            ends.b.receive(refuse, PATIENCE)
        with suppress(ChannelClosed):
            # Refused before the last byte was out, or after.
            sending.result()
        with pytest.raises(ChannelClosed):
            receive(ends.b)
        with pytest.raises(ChannelClosed):
            receive(ends.a)

    def test_messages_over_the_limits_are_refused_and_nothing_is_sent(self, ends: Ends) -> None:
        piece = bytes(MIB)
        for header, buffers in ((b"", []), (bytes(MAX_HEADER + 1), []), (b"h", [piece] * (MAX_BODY // MIB) + [b"x"])):
            with pytest.raises(ProtocolError):
                ends.a.send(header, buffers, PATIENCE)
        send(ends.a, b"next", b"one")
        assert receive(ends.b) == (b"next", b"one")

    def test_many_channels(self, transport: Transport, listener: Listener, identity: Identity | None) -> None:
        pairs = [connect(transport, listener, identity) for _ in range(self.channels)]
        for index, (dialled, _) in enumerate(pairs):
            send(dialled, b"ask", b"%d" % index)
        for index, (_, accepted) in enumerate(pairs):
            assert receive(accepted) == (b"ask", b"%d" % index)
            send(accepted, b"answer", b"%d" % index)
        assert [receive(dialled)[1] for dialled, _ in pairs] == [b"%d" % index for index in range(self.channels)]
        for channel in (channel for pair in pairs for channel in pair):
            channel.abort()

    def test_encryption_and_binding(
        self, ends: Ends, transport: Transport, address: Address, new_identity: NewIdentity | None
    ) -> None:
        assert ends.a.encrypted == ends.b.encrypted == (new_identity is not None)
        assert ends.a.binding == ends.b.binding
        assert ends.a.peer
        if new_identity is None:
            assert ends.a.binding == b"plain"
            return
        other = transport.listen(address, new_identity())
        dialled, accepted = connect(transport, other, new_identity())
        assert dialled.binding == accepted.binding != ends.a.binding
        for end in (dialled, accepted, other):
            end.close()

    def test_a_silent_dialler_holds_nobody_up(
        self, transport: Transport, listener: Listener, identity: Identity | None
    ) -> None:
        silent = Task(lambda: transport.dial(listener.address, identity, 2))
        waiting = listener.accept(PATIENCE)
        dialled, accepted = connect(transport, listener, identity)
        send(dialled, b"still", b"here")
        assert receive(accepted) == (b"still", b"here")
        for channel in (dialled, accepted, waiting):
            channel.abort()
        try:
            silent.result().abort()
        except (ChannelClosed, NodeUnreachable, DeadlineExceeded):
            # With encryption the dialler was waiting for a handshake that never came.
            assert identity is not None

    def test_a_listener_says_where_it_is(self, listener: Listener, address: Address) -> None:
        assert listener.address.port > 0
        assert (listener.address.scheme, listener.address.host) == (address.scheme, address.host)

    def test_an_address_is_given_once(self, transport: Transport, listener: Listener, identity: Identity | None) -> None:
        with pytest.raises(ConfigError, match=str(listener.address.port)):
            transport.listen(listener.address, identity)

    def test_nobody_there_is_said_with_the_address(
        self, transport: Transport, address: Address, identity: Identity | None
    ) -> None:
        listener = transport.listen(address, identity)
        gone = listener.address
        listener.close()
        started = time.monotonic()
        with pytest.raises(NodeUnreachable, match=str(gone.port)):
            transport.dial(gone, identity, 2)
        assert time.monotonic() - started < PATIENCE
