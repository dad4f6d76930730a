"""The stages of a model, one after another. A batch is carried from stage to stage by whoever completed it: the calling
thread, or the thread that read a worker's answer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

from cake_core.cluster.chain import Leg, Places, Route, Router
from cake_core.errors import CakeError, ChannelClosed, NodeLost, StageError
from cake_core.model import Batch, Memory, Pending, SessionSpec
from cake_core.stages.inputs import carried
from cake_core.stages.stage import Stage

log = logging.getLogger(__name__)

Done = Callable[[Batch | None, CakeError | None], None]


class Pipeline:
    """Runs batches through all stages. Stages serve in order, so batches do not overtake one another.

    A session lives on the route that it was opened over. When that is lost another one has to be opened, over the next route,
    with the lost one as its parent. Everything but `done` happens in one thread.
    """

    def __init__(self, stages: Sequence[Stage], wire_dtype: str = "", router: Router | None = None) -> None:
        self.stages = tuple(stages)
        self.wire_dtype = wire_dtype
        self.runs_ahead = len(self.stages) == 1 and self.stages[0].runs_ahead
        self._router = router or Router(self.stages, "star")
        self.seconds = 0.0
        """For which batches have been on their way, all of them added up."""
        self.legs: dict[Places, float] = {}
        """The same for each leg of the routes."""
        self._counting = threading.Lock()
        self._route: Route | None = None
        self._routes: dict[int, Route] = {}

    @property
    def on_gpu(self) -> bool:
        """Whether a stage that keeps a cache is on a CUDA device."""
        return any(memory.kv_tokens and memory.device.startswith("cuda") for memory in self.memory())

    @property
    def stands(self) -> bool:
        """Whether batches can still go the way they went last."""
        return self._route is not None and self._route.up

    def route(self) -> Route:
        """The way that batches go now. Raises NodeError when a node has no link."""
        if self._route is None or not self._route.up:
            self._route = self._router.route()
            log.info("batches go this way: %s", self._route)
        return self._route

    def restage(self, stages: Sequence[Stage], router: Router) -> None:
        """Has the next route lead over other stages that hold the same layers. A node was lost, so that no route is up and none
        is asked for: what lived on the old ones is lost with them."""
        self.stages, self._router, self._route = tuple(stages), router, None

    def submit(self, batch: Batch, done: Done) -> None:
        """Sends a batch on its way; `done(result, error)` is called once, from whichever thread completes it."""
        began = time.perf_counter()

        def ended(result: Batch | None, error: CakeError | None) -> None:
            with self._counting:
                self.seconds += time.perf_counter() - began
            done(result, error)

        try:
            route = self._route_of([row.session for row in batch.rows])
            for leg in route.legs:
                leg.settle()
        except CakeError as error:
            done(None, error)
        else:
            self._run(route, 0, batch, batch, ended)

    def _run(self, route: Route, index: int, batch: Batch, origin: Batch, done: Done) -> None:
        while index < len(route.legs):
            began = time.perf_counter()
            pending = route.legs[index].submit(batch)
            if not pending.done():
                pending.when_done(partial(self._continue, route, index, began, origin, done))
                return
            self._crossed(route.legs[index], began)
            index += 1
            try:
                batch = _following(route, index, pending.result(), origin)
            except Exception as error:
                done(None, _expected(error, route.legs[index - 1]))
                return
        done(batch, None)

    def _continue(self, route: Route, index: int, began: float, origin: Batch, done: Done, pending: Pending) -> None:
        self._crossed(route.legs[index], began)
        index += 1
        try:
            batch = _following(route, index, pending.result(), origin)
        except Exception as error:
            done(None, _expected(error, route.legs[index - 1]))
            return
        self._run(route, index, batch, origin, done)

    def _crossed(self, leg: Leg, began: float) -> None:
        with self._counting:
            self.legs[leg.places] = self.legs.get(leg.places, 0.0) + time.perf_counter() - began

    def open(self, session: int, spec: SessionSpec, parent: int | None = None, length: int = 0) -> int:
        """Opens a session on every stage; returns the positions that all of them really have.

        A stage that kept more than another is cut back, so they agree. A parent may have lived on a route that is lost: what
        each stage still has of it counts.
        """
        route = self.route()
        self._routes[session] = route
        kept = list(chain.from_iterable(leg.open(session, spec, parent, length) for leg in route.legs))
        return self._agree(session, kept)

    def truncate(self, session: int, length: int) -> int:
        kept = [stage.truncate(session, length) for stage in self._route_of([session]).stages]
        return self._agree(session, kept)

    def _agree(self, session: int, kept: list[int]) -> int:
        least = min(kept)
        if any(length != least for length in kept):
            again = [stage.truncate(session, least) for stage in self._route_of([session]).stages]
            return least if set(again) == {least} else self._agree(session, again)
        return least

    def close(self, session: int) -> None:
        route = self._routes.pop(session, None)
        for stage in route.stages if route is not None else ():
            stage.close(session)

    def _route_of(self, sessions: Sequence[int]) -> Route:
        """The one route that all of these live on. Raises NodeLost when there is none any more."""
        routes = {self._routes.get(session) for session in sessions}
        route = routes.pop()
        if routes or route is None or not route.up:
            raise NodeLost("a node was lost, or a link between two")
        return route

    def memory(self) -> list[Memory]:
        return [stage.memory() for stage in self.stages]

    def kv_tokens(self) -> int:
        """Positions of KV cache on the tightest stage that has one; 0 when none has."""
        return min((m.kv_tokens for m in self.memory() if m.kv_tokens), default=0)


def _following(route: Route, index: int, result: Batch, origin: Batch) -> Batch:
    """What leg `index` is given: the hidden states of the one before, and the batch's tokens and targets again."""
    if index == len(route.legs):
        return result
    return Batch(origin.rows, {"hidden": result.tensors["hidden"], **carried(origin.tensors)})


def _expected(error: Exception, leg: Leg) -> CakeError:
    """The error of a batch on this leg; a link that fell names the node, whose own thread may not have noticed yet."""
    if isinstance(error, ChannelClosed):
        names = [name for name, _ in leg.places]
        return NodeLost(f"{' or '.join(names)} is gone: {error}", names[0])
    return error if isinstance(error, CakeError) else StageError(f"{type(error).__name__}: {error}")
