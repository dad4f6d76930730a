"""What the image kit works with: a component that looks remote, and a job painted to its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cake_core.events import ImageDone
from cake_core.model import Component, ImageModel, Memory, Tensor
from cake_core.requests import ImageRequest
from cake_core.testing.contracts.threads import PATIENCE, Task

Assemble = Callable[..., ImageModel]


@dataclass(slots=True)
class Recorder:
    """A component as if it were remote: tensors are copied to plain host memory both ways, and every call is noted."""

    inner: Component
    calls: list[tuple[str, int, Mapping[str, Tensor], Mapping[str, Any], Mapping[str, Tensor]]] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.inner.name

    def call(
        self,
        method: str,
        request: int,
        tensors: Mapping[str, Tensor],
        scalars: Mapping[str, Any],
        constants: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        self.calls.append((method, request, tensors, scalars, constants))
        answer = self.inner.call(method, request, _copied(tensors), dict(scalars), _copied(constants))
        return _copied(answer)

    def close(self, request: int) -> None:
        self.closed.append(request)
        self.inner.close(request)

    def memory(self) -> Memory:
        return self.inner.memory()

    def shutdown(self) -> None:
        self.inner.shutdown()


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: replace(tensor, data=bytes(tensor.data)) for name, tensor in tensors.items()}


def paint(model: ImageModel, request: ImageRequest, cancelled: Callable[[], bool] = lambda: False) -> list[Any]:
    """All events of a job."""
    events: list[Any] = []
    Task(lambda: model.generate(request, events.append, cancelled)).result(3 * PATIENCE)
    return events


def pictures(events: Sequence[Any]) -> list[ImageDone]:
    return [event for event in events if isinstance(event, ImageDone)]
