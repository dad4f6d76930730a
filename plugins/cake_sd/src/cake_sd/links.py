"""How the master reaches the components of one layer: directly, over the wire, and through several replicas of it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from cake_core.errors import Cancelled, NodeError, NodeMismatch
from cake_core.model import Component, Tensor
from cake_core.topology import MASTER
from cake_sd.components import Arguments, Results, TorchComponent
from cake_sd.denoiser import REPEAT, SAMPLES, sample_name
from cake_sd.trace import Trace
from cake_sd.wire import Packer, unpack_results

log = logging.getLogger(__name__)

T = TypeVar("T")

_POLL = 0.1  # seconds between two looks at a lost node: shorter than a person notices
_FORGET = 5.0  # seconds after which a lost replica is tried first again


@dataclass(slots=True)
class Traffic:
    """Tensor bytes of one job that crossed nodes, and how long its remote calls took: `seconds` here, `computing` of
    them on the nodes as far as these tell. Constants count once a node."""

    calls: int = 0
    sent: int = 0
    constants: int = 0
    received: int = 0
    seconds: float = 0.0
    computing: float = 0.0


@dataclass(slots=True)
class Job:
    """One request at work. `id` names it to the components; `cancelled` is asked before each call."""

    id: int
    cancelled: Callable[[], bool] = lambda: False
    traffic: Traffic = field(default_factory=Traffic)
    trace: Trace | None = None

    def check(self) -> None:
        if self.cancelled():
            raise Cancelled("the image request was cancelled")


class Link(Protocol):
    """One component of a layer, called in torch. Not for two threads at a time."""

    name: str

    @property
    def node(self) -> str:
        """Where it computes."""

    @property
    def rejoin(self) -> float:
        """Seconds for which its node may be away now, to be asked before a call."""

    def run(self, method: str, job: Job, arguments: Arguments) -> Results: ...

    def close(self, request: int) -> None: ...


class LocalLink:
    """A component that this process loaded: called as it is, nothing is converted or copied."""

    node = MASTER
    rejoin = 0.0

    def __init__(self, component: TorchComponent) -> None:
        self.name = component.name
        self.component = component

    def run(self, method: str, job: Job, arguments: Arguments) -> Results:
        return self.component.run(method, job.id, arguments)

    def close(self, request: int) -> None:
        self.component.close(request)


_CHANGING = frozenset((*SAMPLES, "x", "z", "hidden"))


class RemoteLink:
    """A component elsewhere: tensors are packed, equal halves of a guided batch sent once, constants once a request."""

    def __init__(self, component: Component, device: torch.device) -> None:
        self.name = component.name
        if hasattr(component, "waits"):
            component.waits = False  # Replicas do: another one takes over, and a cancelled request ends meanwhile
        self.component = component
        self._device = device
        self._packers: dict[tuple[int, str], Packer] = {}
        self._constants: dict[int, dict[int, Tensor]] = {}

    @property
    def node(self) -> str:
        return str(getattr(self.component, "node", self.component.name))

    @property
    def rejoin(self) -> float:
        return float(getattr(self.component, "rejoin", 0.0))

    def run(self, method: str, job: Job, arguments: Arguments) -> Results:
        packer = self._packers.setdefault((job.id, method), Packer(_CHANGING))
        packed = packer.pack(halved(arguments) if method == "forward" else arguments)
        started, computed = time.perf_counter(), self._computed
        results = self.component.call(method, job.id, packed.tensors, packed.scalars, packed.constants)
        job.traffic.computing += self._computed - computed
        self._count(job, started, packed.tensors.values(), packed.constants.values(), results.values())
        return unpack_results(results, self._device)

    @property
    def _computed(self) -> float:
        return float(getattr(self.component, "seconds", 0.0))

    def _count(self, job: Job, started: float, sent: Any, constants: Any, got: Any) -> None:
        traffic = job.traffic
        traffic.calls += 1
        traffic.seconds += time.perf_counter() - started
        traffic.sent += sum(tensor.nbytes for tensor in sent)
        traffic.received += sum(tensor.nbytes for tensor in got)
        known = self._constants.setdefault(job.id, {})
        for tensor in constants:
            if id(tensor) not in known:
                known[id(tensor)] = tensor
                traffic.constants += tensor.nbytes

    def close(self, request: int) -> None:
        for key in [key for key in self._packers if key[0] == request]:
            del self._packers[key]
        self._constants.pop(request, None)
        self.component.close(request)


def halved(arguments: Arguments) -> dict[str, Any]:
    """With guidance a batch holds the same latents twice: one half and a count. Compared bit by bit, never assumed."""
    name = sample_name(arguments)
    sample = arguments[name]
    size = sample.shape[0]
    if size % 2 or not torch.equal(sample[: size // 2], sample[size // 2 :]):
        return dict(arguments)
    return {**arguments, name: sample[: size // 2], REPEAT: 2}


class Replicas:
    """The components that serve one layer. A call that a lost node fails goes to another, or waits for the node's return."""

    def __init__(self, layer: str, links: Sequence[Link]) -> None:
        self.layer = layer
        self.links = tuple(links)
        self._lost: dict[int, float] = {}
        self._locks = [threading.Lock() for _ in links]
        self._halves = ThreadPoolExecutor(2, f"cake-sd {layer}") if len(links) > 1 else None

    def __len__(self) -> int:
        return len(self.links)

    def run(self, method: str, job: Job, arguments: Arguments, lane: int = 0) -> Results:
        """One call on the lane's own replica while it answers. Raises as `attempt` does."""
        started = time.perf_counter()
        results = self.attempt(job, lane, lambda link: link.run(method, job, arguments))
        if job.trace is not None:
            job.trace.add(f"{self.layer} {method}", started, time.perf_counter())
        return results

    def attempt(self, job: Job, lane: int, work: Callable[[Link], T]) -> T:
        """Does `work` on the lane's replica, and all of it again on another when its node is lost.

        Raises the last NodeError when none answered within the rejoin time, Cancelled when the job was meanwhile.
        """
        since: float | None = None
        while True:
            for index in self._order(lane):
                job.check()
                rejoin = max(link.rejoin for link in self.links)
                try:
                    with self._locks[index]:
                        result = work(self.links[index])
                except NodeMismatch:
                    raise
                except NodeError as error:
                    self._lost[index] = now = time.monotonic()
                    if since is None:
                        patience = f"for up to {rejoin:.0f} s" if math.isfinite(rejoin) else "while its place is being loaded"
                        log.warning("%s: %s; trying again %s", self.layer, error, patience)
                        since = now
                    if now - since >= rejoin:
                        raise
                else:
                    self._lost.pop(index, None)
                    return result
            time.sleep(_POLL)

    def _order(self, lane: int) -> list[int]:
        """Replicas to try: the lane's own first, those that were just lost last."""
        count, now = len(self.links), time.monotonic()
        own = [(lane + offset) % count for offset in range(count)]
        return sorted(own, key=lambda index: now - self._lost.get(index, -_FORGET) < _FORGET)

    def run_halves(self, job: Job, arguments: Arguments) -> Results:
        """The two halves of a guided batch on two replicas at once."""
        parts = halves(arguments)
        if parts is None or self._halves is None:
            return self.run("forward", job, arguments)
        pending = [self._halves.submit(self.run, "forward", job, part, lane) for lane, part in enumerate(parts)]
        results = [future.result() for future in pending]
        return {name: torch.cat([result[name] for result in results]) for name in results[0]}

    def close(self, request: int) -> None:
        for link, lock in zip(self.links, self._locks, strict=True):
            with lock:
                link.close(request)

    def shutdown(self) -> None:
        if self._halves is not None:
            self._halves.shutdown()


def halves(arguments: Arguments) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The arguments of each half of the batch; None when its length is odd."""
    size = arguments[sample_name(arguments)].shape[0]
    if size % 2:
        return None
    half = size // 2
    return _part(arguments, size, slice(0, half)), _part(arguments, size, slice(half, size))


def _part(value: Any, size: int, rows: slice) -> Any:
    if isinstance(value, torch.Tensor):
        return value[rows] if value.ndim and value.shape[0] == size else value
    if isinstance(value, dict):
        return {key: _part(item, size, rows) for key, item in value.items()}
    return value
