"""Components of image models on other nodes, as the image engine sees them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from cake_core.errors import CakeError, NodeError, NodeLost, NodeMismatch, TransportError
from cake_core.links.link import Link
from cake_core.model import Buffer, Component, Memory, Tensor
from cake_core.stages.stage import Peer
from cake_core.wire.codec import content_id
from cake_core.wire.listing import tensor_fields
from cake_core.wire.protocol import Type

LOOK = 0.2
"""Seconds between two looks at a lost node by who was not woken."""


class PlacedComponent:
    """A component that a worker serves, or another node once that one is lost and its layers were placed again. A call is
    repeated when the node is back within `rejoin` seconds, or where the component is by then: all state is in the call."""

    def __init__(self, component: RemoteComponent, node: str, patience: Callable[[], float], waits: bool = True) -> None:
        self.name = component.name
        self.waits = waits
        """Whether a call waits for a lost node's return. A backend that does so itself, because it has replicas to go on with
        or wants a cancelled request to end meanwhile, turns it off."""
        self.node = node
        self._component: Component = component
        self._patience = patience
        self._woken = threading.Event()
        self._seconds = 0.0

    @property
    def rejoin(self) -> float:
        """Seconds for which a node may be away now. To be asked before a call: once the time is short again after a node was
        lost, the component has moved."""
        return self._patience()

    @property
    def seconds(self) -> float:
        """Time that workers computed for us, for the bench."""
        return self._seconds + _seconds(self._component)

    @property
    def peer(self) -> Peer | None:
        """The worker that serves it; None on this node."""
        return self._component.peer if isinstance(self._component, RemoteComponent) else None

    def move(self, component: Component, node: str) -> None:
        """Has calls go to another component from now on, also those that wait for the old one."""
        self._seconds = self.seconds - _seconds(component)
        self._component, self.node = component, node

    def wake(self) -> None:
        self._woken.set()

    def call(
        self,
        method: str,
        request: int,
        tensors: Mapping[str, Tensor],
        scalars: Mapping[str, Any],
        constants: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        lost: float | None = None
        while True:
            self._woken.clear()
            patience = self.rejoin
            try:
                return self._component.call(method, request, tensors, scalars, constants)
            except NodeMismatch:
                raise
            except NodeError:
                lost = time.monotonic() if lost is None else lost
                if not self.waits or time.monotonic() - lost >= patience:
                    raise
            self._woken.wait(LOOK)

    def close(self, request: int) -> None:
        self._component.close(request)

    def memory(self) -> Memory:
        return self._component.memory()

    def shutdown(self) -> None:
        """Whoever loaded the component frees it."""


def _seconds(component: Component) -> float:
    return component.seconds if isinstance(component, RemoteComponent) else 0.0


class RemoteComponent:
    """A component on a worker. Constants of a request travel once a link, named by their content."""

    def __init__(self, peer: Peer, name: str) -> None:
        self.name = name
        self.peer = peer
        self._sent: dict[int, set[bytes]] = {}
        self._sent_over: Link | None = None
        self._ids: dict[int, dict[int, tuple[Tensor, bytes]]] = {}
        self.seconds = 0.0
        """Time the worker computed for us."""

    def call(
        self,
        method: str,
        request: int,
        tensors: Mapping[str, Tensor],
        scalars: Mapping[str, Any],
        constants: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        """Raises NodeError, naming the node, when there is no link or it falls meanwhile."""
        link = self._link()
        ids = {name: self._id_of(request, tensor) for name, tensor in constants.items()}
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
        except CakeError as error:
            if link.up or isinstance(error, NodeLost):
                raise
            raise self._lost(error) from error
        sent.update(ids.values())
        self.seconds += message.fields["seconds"]
        return message.tensors(body)

    def _id_of(self, request: int, tensor: Tensor) -> bytes:
        """The content id, worked out once for a tensor object: hashing megabytes at each step would cost milliseconds."""
        known = self._ids.setdefault(request, {})
        if id(tensor) not in known:
            known[id(tensor)] = (tensor, content_id(tensor))
        return known[id(tensor)][1]

    def _link(self) -> Link:
        try:
            return self.peer.link()
        except TransportError as error:  # it does not keep to the protocol, or has another key since it came back
            raise self._lost(error) from error

    def _lost(self, error: CakeError) -> NodeLost:
        return NodeLost(f"{self.peer.name}: {error}", self.peer.name)

    def close(self, request: int) -> None:
        self._sent.pop(request, None)
        self._ids.pop(request, None)
        try:
            self.peer.link().tell(Type.RELEASE, {"layer": self.name, "image": request})
        except CakeError:
            return  # a node that is gone keeps nothing of ours

    def memory(self) -> Memory:
        return self.peer.memory_of((self.name,))

    def shutdown(self) -> None:
        """Nothing of ours is on the node once its requests are closed."""
