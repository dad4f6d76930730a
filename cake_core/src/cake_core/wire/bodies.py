"""Bodies of messages: memory for one that arrives, checked against its header, and the tensors in it in groups."""

from __future__ import annotations

from collections.abc import Sequence

from cake_core.errors import ProtocolError
from cake_core.model import Buffer, Tensor
from cake_core.wire.protocol import Message, decode


class BodyReader:
    """The `allocate` of one channel's reader: decodes the header, checks it against the body's length and the limit, and
    keeps the decoded message so that nothing is decoded twice."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._decoded: Message | None = None

    def allocate(self, header: bytes, length: int) -> memoryview:
        message = decode(header)
        if length != message.body_length:
            raise ProtocolError(f"{message.type.name}: shapes need {message.body_length} bytes, {length} were declared")
        if length > self.limit:
            raise ProtocolError(f"{message.type.name}: a body of {length} bytes, over the limit of {self.limit}")
        self._decoded = message
        return memoryview(bytearray(length))

    def message(self, header: bytes) -> Message:
        """The message of a header that `receive` returned."""
        message, self._decoded = self._decoded, None
        if message is None:
            message = decode(header)
            if message.body_length:
                raise ProtocolError(f"{message.type.name}: its body is missing")
        return message


def split_buffers(message: Message, body: Buffer, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of a body in two groups: those listed in `names`, and the others."""
    tensors = message.tensors(body)
    return {n: t for n, t in tensors.items() if n in names}, {n: t for n, t in tensors.items() if n not in names}
