"""Carries out what masters assign to a worker: fetches the files, loads the layers, tells how far it is.

One assignment at a time. It may be replaced as long as no other master uses it; masters that assign the same share it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from cake_core.assignment import Assignment
from cake_core.errors import CakeError, Cancelled, NodeBusy, StageError
from cake_core.links.link import Link, LinkTiming
from cake_core.model import LoadOptions
from cake_core.plugins import Plugins
from cake_core.warming import Streaming, Warming
from cake_core.weights.arriving import Arriving
from cake_core.weights.manifest import view_name
from cake_core.weights.store import Store
from cake_core.weights.supply import LinkSource, StoreSupply, serve_weights
from cake_core.weights.transfer import Transfer
from cake_core.weights.views import Views
from cake_core.wire.codec import error_fields
from cake_core.wire.protocol import Message, Type
from cake_core.worker.hops import Dial
from cake_core.worker.job import Job
from cake_core.worker.serving import Serving, ServingSpec

log = logging.getLogger(__name__)

MOST_INVITED = 8
"""Further links that masters may ask for during one assignment."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Means:
    """What a worker has for assignments. `say` tells the person at this machine; `cache_size` bytes are kept of models that
    were assigned before (None: all)."""

    store: Store
    options: LoadOptions = field(default_factory=LoadOptions)
    say: Say = log.info
    cache_size: int | None = None


class Tenant:
    """`serving` is what is loaded, None before anything is. `dial` reaches other workers, for the weights they have."""

    def __init__(
        self, plugins: Plugins, node: str, means: Means, timing: LinkTiming | None = None, dial: Dial | None = None
    ) -> None:
        self.serving: Serving | None = None
        self.means = means
        self._plugins = plugins
        self._node = node
        self._supply = StoreSupply(means.store)
        self._timing = timing
        self._dial = dial
        self._held: Assignment | None = None
        self._job: Job | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._working = threading.Lock()
        self._retired: list[Serving] = []

    def serve(self, link: Link, message: Message, others: list[str]) -> None:
        """Answers an ASSIGN, LEND, FETCH or HOLDS. `others` names the other masters that use this worker."""
        if message.type is Type.ASSIGN:
            self._assign(link, message, others)
        elif message.type is Type.LEND:
            self.lend(message.fields["ticket"], link)
        else:
            serve_weights(self._supply, link, message)

    def _assign(self, link: Link, message: Message, others: list[str]) -> None:
        """Answers an ASSIGN, and carries it out in a thread of its own.

        Raises NodeBusy, saying who holds it, when another master uses other layers or another model.
        """
        asked = Assignment.from_fields(message.fields)
        with self._lock:
            job, held = self._job, self._held
            waiting = [other.name for other in job.links if other is not link and other.up] if job else []
            current = job.assignment if job else held
            if current is not None and current.key != asked.key and (others or waiting):
                raise NodeBusy(
                    f"{self._node} is held by {', '.join({*others, *waiting})} ({current.master}) with {current.model}: "
                    f"{current.layers}; wait until they end, or start another worker"
                )
            if job is not None and job.assignment.key == asked.key:
                job.links.append(link)
                job.tickets.add(asked.ticket)
                link.answer(message, Type.ASSIGNED, {})
                return
            self._end_job(job)
            link.answer(message, Type.ASSIGNED, {})
            self._start(asked, link)

    def _start(self, asked: Assignment, link: Link) -> None:
        job = Job(asked, Transfer(self.means.store, asked.files))
        job.links.append(link)
        job.tickets.add(asked.ticket)
        job.transfer.add(LinkSource(link))
        if self._held is not None and self._held.key != asked.key and self.serving is not None:
            self._retired.append(self.serving)  # from now on nobody can attach to it
            self.serving, self._held = None, None
        self._job = job
        self._thread = threading.Thread(target=self._run, args=(job,), name="cake-assign", daemon=True)
        self._thread.start()

    def _end_job(self, job: Job | None) -> None:
        """Another assignment replaces one that nobody waits for any more."""
        if job is None:
            return
        job.transfer.cancel(Cancelled("another assignment came"))

    def lend(self, ticket: int, link: Link) -> None:
        """A further link to a master whose assignment is being carried out. Raises StageError for a ticket that is none."""
        with self._lock:
            job = self._job
            if job is None or ticket not in job.tickets:
                raise StageError("this ticket is for nothing that is on its way")
            job.transfer.add(LinkSource(link))

    def invite(self, link: Link) -> None:
        """A master asks for a further link. Raises StageError unless it waits for a transfer, and for too many."""
        with self._lock:
            job = self._job
            if job is None or link not in job.links or job.invited >= MOST_INVITED:
                raise StageError("a further link is for weights that are on their way, and there are few of them")
            job.invited += 1

    def close(self) -> None:
        with self._lock:
            self._end_job(self._job)
            thread = self._thread
        if thread is not None:
            thread.join()
        for serving in (self.serving, *self._retired):
            if serving is not None:
                serving.shutdown()

    # In the job's thread

    def _run(self, job: Job) -> None:
        error: dict[str, str] = {}
        try:
            with self._working:
                self._carry_out(job)
        except CakeError as failure:
            error = error_fields(failure)
        except Exception as failure:
            log.exception("an assignment failed")
            error = error_fields(StageError(f"{self._node}: {type(failure).__name__}: {failure}"))
        with self._lock:
            if self._job is job:
                self._job = None
        if error:
            self.means.say(f"{job.assignment.layers} of {job.assignment.model}: {error['message']}")
        job.told(error)

    def _carry_out(self, job: Job) -> None:
        asked, views = job.assignment, Views(self.means.store)
        if self._held is not None and self._held.key == asked.key:
            return
        views.announce(asked.files, asked.model, asked.layers)
        self.means.say(f"{asked.master} assigns {asked.layers} of {asked.model}")
        if self._dial is not None:
            job.meet(self._dial, self._timing)
        try:
            with Arriving(job.transfer, views, asked.files, asked.model) as arriving:
                self.serving, self._held = self._load(job, arriving), asked
        finally:
            job.end()
        self.means.say(f"serving {asked.layers} of {asked.model} ({job.transfer.received / 1e6:.1f} MB fetched)")
        if self.means.cache_size is not None:
            views.prune(self.means.cache_size, keep=(view_name(asked.files),))

    def _load(self, job: Job, arriving: Arriving) -> Serving:
        """Loads while weights still come, where the backend can."""
        asked, plugins = job.assignment, self._plugins
        warming = Warming(backend for backend in plugins.backends.values() if backend.model_type == asked.model_type)
        try:
            checkpoint = arriving.headers()
            if not isinstance(plugins.backend_for(checkpoint, asked.model_type), Streaming):
                checkpoint = arriving.whole()
        finally:
            warming.wait()
        while self._retired:
            self._retired.pop().shutdown()
        options = asked.load_options(self.means.options)
        serving = Serving(plugins, ServingSpec(checkpoint, self._node, asked.stages, options, asked.model_type))
        serving.load(lambda _, done, total: job.tell("loading", done, total) if arriving.over else None)
        try:
            arriving.finish()
        except CakeError:
            serving.shutdown()
            raise
        return serving
