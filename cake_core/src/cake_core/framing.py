"""Messages on a stream of bytes, for transports that move one: a fixed prefix, the header, the body. No input or output.

The prefix is `CAK1`, the header's length (u32) and the body's (u64), big endian. It is checked before anything is
allocated, and its first wrong byte ends the connection.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from cake_core.errors import ProtocolError
from cake_core.model import Buffer
from cake_core.transport import MAX_BODY, MAX_HEADER, Allocate

MAGIC = b"CAK1"
PREFIX = struct.Struct("!4sIQ")
_EMPTY = memoryview(b"")


def frame(header: bytes, buffers: Sequence[Buffer]) -> list[memoryview]:
    """A message as the pieces to send, the body's buffers as they are. Raises ProtocolError when it is over the limits."""
    pieces, body = [], 0
    for buffer in buffers:
        view = memoryview(buffer)
        if view.nbytes:
            pieces.append(view.cast("B"))
            body += view.nbytes
    if not 1 <= len(header) <= MAX_HEADER:
        raise ProtocolError(f"a message's header has 1 to {MAX_HEADER} bytes, not {len(header)}")
    if body > MAX_BODY:
        raise ProtocolError(f"a message's body has at most {MAX_BODY} bytes, not {body}; send it in parts")
    return [memoryview(PREFIX.pack(MAGIC, len(header), body) + header), *pieces]


class Inbox:
    """Turns arriving bytes into messages; keeps what has arrived between calls.

    `space` is where the next bytes belong, `arrived` says how many were put there, `next` takes a message out. Small
    messages arrive whole in one buffer, so they cost one read; a large body is read straight into its own memory.
    """

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(PREFIX.size + MAX_HEADER))
        self._start = 0
        self._end = 0
        self._header: bytes | None = None
        self._body = _EMPTY
        self._filled = 0

    @property
    def begun(self) -> bool:
        """Whether part of a message has arrived."""
        return self._header is not None or self._start < self._end

    @property
    def in_body(self) -> bool:
        """Whether the header has arrived and been accepted, and the body has not in whole."""
        return self._header is not None

    def space(self) -> memoryview:
        """Writable memory, never empty, for the bytes that come next. To be asked after `next` returned None."""
        if self._header is not None:
            return self._body[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start:
            # The rest of a prefix and header must fit behind what is there.
            rest = self._end - self._start
            self._buffer[:rest] = bytes(self._buffer[self._start : self._end])
            self._start, self._end = 0, rest
        return self._buffer[self._end :]

    def arrived(self, count: int) -> None:
        if self._header is not None:
            self._filled += count
        else:
            self._end += count

    def next(self, allocate: Allocate) -> tuple[bytes, memoryview] | None:
        """The next message if it is complete. Raises ProtocolError for bytes that are none, or what `allocate` raises."""
        if self._header is None and (self._start == self._end or not self._begin(allocate)):
            return None
        if self._filled < self._body.nbytes:
            return None
        header, body = self._header or b"", self._body
        self._header, self._body = None, _EMPTY
        return header, body

    def _begin(self, allocate: Allocate) -> bool:
        have = self._end - self._start
        if have < PREFIX.size:
            magic = bytes(self._buffer[self._start : self._start + min(have, len(MAGIC))])
            if not MAGIC.startswith(magic):
                raise ProtocolError(_stranger(magic))
            return False
        magic, length, body = PREFIX.unpack_from(self._buffer, self._start)
        if magic != MAGIC:
            raise ProtocolError(_stranger(magic))
        if not 1 <= length <= MAX_HEADER or body > MAX_BODY:
            raise ProtocolError(f"it announced a message of {length} + {body} bytes, which is over the limits")
        start = self._start + PREFIX.size
        if have < PREFIX.size + length:
            return False
        header = bytes(self._buffer[start : start + length])
        self._body = _allocated(allocate, header, body)
        self._start = start + length
        self._filled = min(self._end - self._start, body)
        if self._filled:
            self._body[: self._filled] = self._buffer[self._start : self._start + self._filled]
        self._start += self._filled
        self._header = header
        return True


def _allocated(allocate: Allocate, header: bytes, length: int) -> memoryview:
    if not length:
        return _EMPTY
    memory = memoryview(allocate(header, length)).cast("B")
    if memory.nbytes != length or memory.readonly:
        raise ProtocolError(f"allocate() must hand out {length} writable bytes, not {memory.nbytes}")
    return memory


def _stranger(magic: bytes) -> str:
    if magic[:1] == b"\x16":
        return "it began to encrypt where this end does not; start both with the cluster key or both with --insecure"
    return "it does not speak Cake's protocol; is it another program?"
