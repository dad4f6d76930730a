"""Components of image models on other nodes, as the image engine sees them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from cake_core.errors import CakeError, NodeError, NodeLost, ProtocolError
from cake_core.links.link import Link
from cake_core.model import Buffer, Memory, Tensor
from cake_core.stages.stage import Peer
from cake_core.wire.codec import content_id
from cake_core.wire.listing import tensor_fields
from cake_core.wire.protocol import Type


class RemoteComponent:
    """A component of an image model on a worker. A call is repeated when its node is lost and back within `rejoin`
    seconds: all state is in the call. Constants of a request travel once a link, named by their content."""

    def __init__(self, peer: Peer, name: str, rejoin: float, waits: bool = True) -> None:
        self.name = name
        self.node = peer.name
        self.rejoin = rejoin
        self.waits = waits
        """Whether a call waits for a lost node's return. A backend that does so itself, because it has replicas to go on with
        or wants a cancelled request to end meanwhile, turns it off."""
        self._peer = peer
        self._sent: dict[int, set[bytes]] = {}
        self._sent_over: Link | None = None
        self._ids: dict[int, dict[int, tuple[Tensor, bytes]]] = {}
        self.seconds = 0.0
        """Time the worker computed for us, for the bench."""

    def call(
        self,
        method: str,
        request: int,
        tensors: Mapping[str, Tensor],
        scalars: Mapping[str, Any],
        constants: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        until = time.monotonic() + (self.rejoin if self.waits else 0.0)
        ids = {name: self._id_of(request, tensor) for name, tensor in constants.items()}
        link = self._peer.link()
        while True:
            try:
                return self._call_once(link, method, request, tensors, scalars, constants, ids)
            except NodeLost:
                link = self._peer.wait_up(max(0.0, until - time.monotonic()))

    def _call_once(
        self,
        link: Link,
        method: str,
        request: int,
        tensors: Mapping[str, Tensor],
        scalars: Mapping[str, Any],
        constants: Mapping[str, Tensor],
        ids: Mapping[str, bytes],
    ) -> Mapping[str, Tensor]:
        if link is not self._sent_over:
            self._sent, self._sent_over = {}, link
        sent = self._sent.setdefault(request, set())
        new = {name: tensor for name, tensor in constants.items() if ids[name] not in sent}
        listed_new, buffers = tensor_fields(new)
        listed, more = tensor_fields(tensors)
        fields = {
            "layer": self.name,
            "method": method,
            "image": request,
            "scalars": dict(scalars),
            "tensors": listed,
            "constants": listed_new,
            "ids": dict(ids),
        }
        all_buffers: list[Buffer] = [*buffers, *more]
        try:
            message, body = link.ask(Type.CALL, fields, buffers=all_buffers).result()
        except ProtocolError:
            raise
        except CakeError as error:
            raise self._lost(link, error) from error
        sent.update(ids.values())
        self.seconds += message.fields["seconds"]
        return message.tensors(body)

    def _id_of(self, request: int, tensor: Tensor) -> bytes:
        """The content id, worked out once for a tensor object: hashing megabytes at each step would cost milliseconds."""
        known = self._ids.setdefault(request, {})
        if id(tensor) not in known:
            known[id(tensor)] = (tensor, content_id(tensor))
        return known[id(tensor)][1]

    def _lost(self, link: Link, error: CakeError) -> CakeError:
        return error if link.up or isinstance(error, NodeLost) else NodeLost(f"{self.node}: {error}", self.node)

    def close(self, request: int) -> None:
        self._sent.pop(request, None)
        self._ids.pop(request, None)
        try:
            self._peer.link().tell(Type.RELEASE, {"layer": self.name, "image": request})
        except NodeError:
            return  # a node that is gone keeps nothing of ours

    def memory(self) -> Memory:
        return self._peer.memory_of((self.name,))

    def shutdown(self) -> None:
        """Nothing of ours is on the node once its requests are closed."""
