"""Jobs of many requests over an engine that takes few at a time; errors after what came before them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from cake_core.errors import CakeError, QueueFullError, RequestError
from cake_core.events import Failed, Finished, TokenEvent, Usage
from cake_server.bridge import WINDOW, Courier, Job

END = Finished("stop", "", Usage(1, 1))


class SmallEngine:
    """Admits `size` requests at once; each is one token, from a thread of its own, whose id is the request."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.inside = self.most = self.cancelled = 0
        self.lock = threading.Lock()

    def submit(self, request: int, sink: Callable[[Sequence[Any]], None]) -> SmallEngine:
        with self.lock:
            if self.inside >= self.size:
                raise QueueFullError("full")
            self.inside += 1
            self.most = max(self.most, self.inside)
        if request >= 0:
            threading.Thread(target=self._run, args=(request, sink), daemon=True).start()
        return self

    def _run(self, request: int, sink: Callable[[Sequence[Any]], None]) -> None:
        with self.lock:
            self.inside -= 1
        sink([TokenEvent(request, "x")])
        sink([END])

    def cancel(self) -> None:
        self.cancelled += 1


def run(work: Callable[[Courier], Coroutine[Any, Any, Any]]) -> Any:
    async def main() -> Any:
        return await asyncio.wait_for(work(Courier(asyncio.get_running_loop())), 20)

    return asyncio.run(main())


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_every_request_is_answered_once_however_few_fit(size: int) -> None:
    engine = SmallEngine(size)

    async def work(courier: Courier) -> list[tuple[int, int]]:
        job: Job[int, Any] = Job(engine, range(200), courier, 100)
        found = []
        while job.more:
            found += [(index, event.token) for index, event, _ in await job.get() if isinstance(event, TokenEvent)]
        return found

    assert sorted(run(work)) == [(index, index) for index in range(200)]
    assert engine.most <= min(size, WINDOW)


def test_a_full_queue_refuses_a_job_that_has_not_begun() -> None:
    async def work(courier: Courier) -> None:
        with pytest.raises(QueueFullError):
            Job(SmallEngine(0), [1, 2], courier, 100)

    run(work)


def test_a_later_request_that_is_wrong_cancels_the_earlier_ones() -> None:
    class Picky(SmallEngine):
        def submit(self, request: int, sink: Callable[[Sequence[Any]], None]) -> SmallEngine:
            if request == 3:
                raise RequestError("three", "prompt")
            return super().submit(request, sink)

    engine = Picky(10)

    async def work(courier: Courier) -> None:
        with pytest.raises(RequestError):
            Job(engine, [-1, -2, 3], courier, 100)

    run(work)
    assert engine.cancelled == 2


def test_an_abort_comes_after_what_was_there_before_it() -> None:
    engine = SmallEngine(5)

    async def work(courier: Courier) -> None:
        job: Job[int, Any] = Job(engine, [-1], courier, 100)
        courier.deliver(job._put, 0, [TokenEvent(7, "x")])
        await asyncio.sleep(0.01)
        job.abort(CakeError("enough"))
        job.abort(CakeError("too late"))
        assert [event.token for _, event, _ in await job.get()] == [7]
        with pytest.raises(CakeError, match="enough"):
            await job.get()

    run(work)
    assert engine.cancelled == 1


def test_a_failure_before_any_output_is_raised_at_once_and_a_later_one_is_not() -> None:
    async def work(courier: Courier) -> None:
        early: Job[int, Any] = Job(SmallEngine(5), [-1], courier, 100)
        courier.deliver(early._put, 0, [Failed(CakeError("early"))])
        with pytest.raises(CakeError, match="early"):
            await early.first(5)
        quiet: Job[int, Any] = Job(SmallEngine(5), [-1], courier, 100)
        await quiet.first(0.01)
        courier.deliver(quiet._put, 0, [TokenEvent(1, "x"), Failed(CakeError("late"))])
        kinds = [type(event) for _, event, _ in await quiet.get()]
        assert kinds == [TokenEvent, Failed]
        assert not quiet.more

    run(work)


def test_a_courier_outlives_its_loop_quietly() -> None:
    couriers: list[Courier] = []

    async def work(courier: Courier) -> None:
        couriers.append(courier)

    run(work)
    couriers[0].deliver(lambda *_: None, 0, [END])


def test_woken_with_nothing_it_gives_nothing() -> None:
    async def work(courier: Courier) -> list[Any]:
        job: Job[int, Any] = Job(SmallEngine(5), [-1], courier, 100)
        asyncio.get_running_loop().call_later(0.01, job.wake)
        return await job.get()

    assert run(work) == []
