"""A link: requests and answers over one authenticated channel, the same object at both ends.

One thread reads. Answers complete what waits for them; requests go to the handler, in the reading thread: on a worker that
thread computes and sends the result itself, with no hand-off. Life is told by bytes, not by answers: a second thread sends
ALIVE whenever nothing else was sent for a while, so a peer that computes for minutes is alive and one that is frozen or
cut off is noticed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from cake_core.errors import CakeError, ChannelClosed, DeadlineExceeded, NodeLost, ProtocolError, TransportError
from cake_core.links.waiting import Entry, Waiting
from cake_core.model import Batch, Buffer, Pending
from cake_core.transport import Channel
from cake_core.wire.bodies import BodyReader
from cake_core.wire.codec import error_fields, error_from_fields
from cake_core.wire.protocol import ANSWERS, CHAINED, Message, Type, encode, encode_batch

log = logging.getLogger(__name__)

MAX_BODY = 256 * 1024 * 1024
"""Largest body in bytes one message of a link may have. Callers split what is larger."""


@dataclass(frozen=True, slots=True)
class LinkTiming:
    """Seconds: `heartbeat` between signs of life, `dead` of silence until the peer is given up, `request` until an answer
    must have come."""

    heartbeat: float = 2.0
    dead: float = 10.0
    request: float = 600.0


@dataclass(slots=True)
class LinkCount:
    """Messages and bytes since the link came up, headers included."""

    sent: int = 0
    received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


Handler = Callable[["Link", Message, memoryview], None]
Down = Callable[["Link", CakeError], None]

_ANSWERS = frozenset({*ANSWERS.values(), Type.ERROR})


class Link:
    """`handler` gets every request of the peer; `on_down` is called once, in the reading thread and as its last act, with
    the reason, after everything that waited has failed with it."""

    def __init__(self, channel: Channel, name: str, handler: Handler, on_down: Down, timing: LinkTiming | None = None) -> None:
        self.channel = channel
        self.name = name
        self.count = LinkCount()
        self._handler = handler
        self._on_down = on_down
        self._timing = timing or LinkTiming()
        self.hops: dict[bytes, str] = {}
        """Tickets of the hand-overs to another worker that the peer keeps up for us, and that worker's name."""
        self._waiting = Waiting()
        self._lock = threading.Lock()
        self._down: CakeError | None = None
        self._last_sent = time.monotonic()
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._read, name=f"cake-link-{name}", daemon=True),
            threading.Thread(target=self._beat, name=f"cake-beat-{name}", daemon=True),
        ]

    def start(self) -> None:
        with self._lock:  # or `join` could find a thread that has a number and has not started yet, which is an error
            for thread in self._threads:
                thread.start()

    @property
    def up(self) -> bool:
        return self._down is None

    # Asking

    def forward(self, stage: int, batch: Batch) -> Pending:
        """Sends a batch; the answer's rows are the batch's own."""
        pending = Pending()
        number = self._waiting.add(Entry(time.monotonic(), Type.OUTPUT, pending, batch.rows))
        if number:
            self.send_batch(number, batch, stage)
        else:
            pending.fail(self.reason())
        return pending

    def send_batch(self, number: int, batch: Batch, stage: int, hops: int = 0) -> None:
        """Sends a batch whose answer is awaited elsewhere: by `expect`, or by the master of a worker that passes it on."""
        header, buffers = encode_batch(Type.FORWARD, number, batch, stage, hops)
        self._send_or_fail(header, buffers)

    def expect(self, number: int, pending: Pending, batch: Batch) -> None:
        """Awaits the answer to a chain's request, which this peer or another may give; it fails when either link falls."""
        if not self._waiting.add(Entry(time.monotonic(), Type.OUTPUT, pending, batch.rows), number):
            pending.fail(self.reason())
        else:
            pending.when_done(lambda _: self._waiting.drop(number))

    def part(self, ticket: bytes, error: CakeError) -> None:
        """The peer has lost a hand-over: whatever crosses it is lost with it."""
        if ticket in self.hops:
            del self.hops[ticket]
            for entry in self._waiting.take_chained():
                entry.fail(error)

    def ask(
        self, kind: Type, fields: Mapping[str, Any] | None = None, stage: int = 0, buffers: Sequence[Buffer] = ()
    ) -> Future[tuple[Message, memoryview]]:
        """Sends a request that expects an answer; the future raises what the peer or the link failed with."""
        future: Future[tuple[Message, memoryview]] = Future()
        number = self._waiting.add(Entry(time.monotonic(), ANSWERS[kind], future=future))
        if number:
            self._send_or_fail(encode(kind, number, fields, stage), buffers)
        else:
            future.set_exception(self.reason())
        return future

    def tell(self, kind: Type, fields: Mapping[str, Any] | None = None, stage: int = 0) -> None:
        """Sends what expects no answer. A link that is down swallows it: its end has been reported already."""
        self._send_or_fail(encode(kind, 0, fields, stage), ())

    # Answering

    def answer(self, request: Message, kind: Type, fields: Mapping[str, Any], buffers: Sequence[Buffer] = ()) -> None:
        self._send_or_fail(encode(kind, request.request, fields, request.stage), buffers)

    def answer_batch(self, request: Message, tensors: Batch) -> None:
        header, buffers = encode_batch(Type.OUTPUT, request.request, tensors, request.stage)
        self._send_or_fail(header, buffers)

    def answer_error(self, request: Message, error: BaseException) -> None:
        self.answer(request, Type.ERROR, error_fields(error))

    # Ending

    def close(self) -> None:
        """Ends the link in order; whatever still waits fails."""
        self._fall(ChannelClosed(f"the link to {self.name} was closed"), abort=False)

    def join(self, timeout: float = 5.0) -> None:
        """Waits for the link's threads, unless called from one of them."""
        with self._lock:
            started = [thread for thread in self._threads if thread.ident is not None]
        for thread in started:
            if thread is not threading.current_thread():
                thread.join(timeout)

    # Inside

    def reason(self) -> CakeError:
        """Why the link is down."""
        return self._down or ChannelClosed(f"the link to {self.name} is down")

    def _send_or_fail(self, header: bytes, buffers: Sequence[Buffer]) -> None:
        if self._down is not None:
            return
        try:
            self.channel.send(header, buffers, timeout=self._timing.dead)
        except DeadlineExceeded:
            self._fall(NodeLost(f"{self.name} has taken nothing for {self._timing.dead:g} s; it is frozen or cut off"))
            return
        except TransportError as error:
            self._fall(error)
            return
        self._last_sent = time.monotonic()
        self.count.sent += 1
        self.count.bytes_sent += len(header)
        for buffer in buffers:
            self.count.bytes_sent += memoryview(buffer).nbytes

    def _read(self) -> None:
        reader = BodyReader(MAX_BODY)
        while self._down is None:
            try:
                header, body = self.channel.receive(reader.allocate, timeout=self._timing.dead)
                message = reader.message(header)
                self.count.received += 1
                self.count.bytes_received += len(header) + body.nbytes
                self._dispatch(message, body)
            except DeadlineExceeded:
                self._fall(NodeLost(f"{self.name} has been silent for {self._timing.dead:g} s; it is frozen or cut off"))
            except ProtocolError as error:
                log.warning("%s sent something that is not our protocol: %s", self.name, error)
                self._send_or_fail(encode(Type.ERROR, 0, error_fields(error)), ())
                self._fall(error, abort=False)
            except TransportError as error:
                self._fall(error)
            except Exception as error:
                # A bug in a handler must not leave the peer waiting for ever on a thread that is gone.
                log.exception("the link to %s failed", self.name)
                self._fall(NodeLost(f"{self.name}: internal error: {error}"))
        self._on_down(self, self.reason())

    def _dispatch(self, message: Message, body: memoryview) -> None:
        if message.type is Type.ALIVE:
            return
        if message.type not in _ANSWERS:
            self._handler(self, message, body)
            return
        waiting = self._waiting.take(message.request)
        if waiting is None and message.request & CHAINED:
            return  # a chain that was given up, or that another of its workers has answered for
        if message.type is Type.ERROR:
            error = error_from_fields(message.fields)
            if waiting is None:
                raise ChannelClosed(f"{self.name} closed the link: {error}")
            waiting.fail(error)
        elif waiting is None:
            raise ProtocolError(f"an answer to request {message.request}, which was never asked")
        elif waiting.answer is not message.type:
            error = ProtocolError(f"{message.type.name} answers what asks for {waiting.answer.name}")
            waiting.fail(error)
            raise error
        else:
            waiting.complete(message, body)

    def _beat(self) -> None:
        timing = self._timing
        while not self._ended.wait(timing.heartbeat / 2):
            now = time.monotonic()
            if now - self._last_sent >= timing.heartbeat / 2:
                self._send_or_fail(encode(Type.ALIVE, 0), ())
            if now - self._waiting.oldest(now) > timing.request:
                self._fall(NodeLost(f"{self.name} has not answered a request for {timing.request:g} s; it is stuck"))

    def _fall(self, error: CakeError, abort: bool = True) -> None:
        with self._lock:
            if self._down is not None:
                return
            self._down = error
        waiting = self._waiting.close()
        self._ended.set()
        if abort:
            self.channel.abort()
        else:
            self.channel.close()
        for entry in waiting:
            entry.fail(error)
