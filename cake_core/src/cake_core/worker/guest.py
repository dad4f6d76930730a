"""One master on a worker: its link, its sessions, its constants. Every failure is answered, none ends the link."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cake_core.caches import LITTLE, sweep
from cake_core.errors import CakeError, CapacityError, NodeMismatch, NodeUnassigned, ProtocolError, StageError, TransportError
from cake_core.links.link import Link
from cake_core.model import Batch, Row
from cake_core.profiles import NodeProfile
from cake_core.stages.inputs import inputs_of
from cake_core.stages.stage import LocalStage
from cake_core.topology import compress
from cake_core.wire.bodies import split_buffers
from cake_core.wire.codec import spec_from_fields
from cake_core.wire.listing import tensor_fields
from cake_core.wire.protocol import CHAINED, Message, Type
from cake_core.worker.constants import Constants
from cake_core.worker.hops import Forward, Hops
from cake_core.worker.host import Again, Host
from cake_core.worker.parking import TOKEN, Key
from cake_core.worker.serving import Serving

log = logging.getLogger(__name__)

MAX_SESSIONS = 4096
"""Sessions one master may have open at once on one stage."""
_session_numbers = itertools.count(1)


class Guest:
    """Serves the requests of one master, in the thread that reads its link."""

    link: Link
    hops: Hops

    def __init__(self, worker: Host, again: Again | None = None) -> None:
        self._worker = worker
        self._again = again
        self._serving: Serving | None = None
        self._assigned = False
        self._forward_to: Forward | None = None
        """Set when no master but another worker is at the other end."""
        self.token = b""  # by which the master finds its sessions should the link fall; empty: they end with it
        self._keep = 0.0
        self.sessions: dict[Key, int] = {}
        self._constants = Constants()

    @property
    def attached(self) -> bool:
        return self._serving is not None

    def handle(self, link: Link, message: Message, body: memoryview) -> None:
        """Serves one request; every failure is answered, none ends the link."""
        try:
            self._serve(link, message, body)
        except TransportError:
            raise
        except CakeError as error:
            self._refuse(link, message, error)
        except Exception as error:
            log.exception("%s of %s failed", message.type.name, link.name)
            self._refuse(link, message, StageError(f"{self._worker.name}: {type(error).__name__}: {error}"))

    def _refuse(self, link: Link, message: Message, error: CakeError) -> None:
        if message.request:
            link.answer_error(message, error)
        else:
            log.warning("%s: %s failed: %s", link.name, message.type.name, error)

    def _serve(self, link: Link, message: Message, body: memoryview) -> None:
        if self._forward_to is not None:
            self._forward_to(message, body)
            return
        match message.type:
            case Type.FORWARD:
                self._forward(message, body)
            case Type.ATTACH:
                self._attach(message.fields)
                link.answer(message, Type.ATTACHED, self._worker.report())
            case Type.OPEN:
                self._open(link, message)
            case Type.TRUNCATE:
                stage = self._stage(message)
                kept = stage.truncate(self._own(message.stage, message.fields["session"]), message.fields["length"])
                link.answer(message, Type.LENGTH, {"length": kept})
            case Type.CLOSE:
                self._close(message)
            case Type.CALL:
                self._call(link, message, body)
            case Type.RELEASE:
                self._release_image(message.fields["image"], message.fields["layer"])
            case Type.STATUS:
                link.answer(message, Type.REPORT, {"report": self._worker.report()})
            case Type.EXPECT:
                self._stage(message)
                self.hops.expect(message.stage, message.fields)
                link.answer(message, Type.READY, {})
            case Type.NEXT:
                self._stage(message)
                self.hops.go_on(message.stage, message.fields)
                link.answer(message, Type.READY, {})
            case Type.PEER:
                self._forward_to = self._worker.claim(message.fields["ticket"], link)
                link.answer(message, Type.READY, {})
            case Type.PROFILE:
                link.answer(message, Type.PROFILED, {"profile": self._profile(message).as_fields()})
            case Type.PROBE:
                _probe(link, message)
            case Type.ASSIGN | Type.LEND | Type.FETCH | Type.HOLDS:
                if message.type is Type.ASSIGN:
                    self.release()
                    self._assigned = True
                self._worker.tenant().serve(link, message, self._worker.holders(self))
            case Type.JOIN:
                self._worker.tenant().invite(link)
                self._worker.join(self._again, link, message)
            case _:
                raise StageError(f"a worker does not serve {message.type.name}")

    def _attach(self, fields: Mapping[str, Any]) -> None:
        worker, serving = self._worker, self._worker.serving
        if serving is None or (worker.bare and not self._assigned):
            raise NodeUnassigned(f"{worker.name} has no layers yet; let a master assign some, or start it with --model")
        asked, served = fields["stages"], [list(span) for span in serving.spans]
        if fields["model_type"] != serving.info.model_type:
            raise NodeMismatch(
                f"{worker.name} serves a {serving.info.model_type} model ({serving.info.name}), the master asks for a "
                f"{fields['model_type']} model; start the worker with the master's --model"
            )
        if asked != served:
            raise NodeMismatch(
                f"{worker.name} serves {_listed(served)}, the master's topology says {_listed(asked)}; "
                "give both the same topology and restart the worker"
            )
        self._serving = serving
        self._remember_master(fields)

    def _remember_master(self, fields: Mapping[str, Any]) -> None:
        """Takes what lets a master that is cut off go on from its sessions; one that says nothing of it leaves none behind."""
        token, keep = fields.get("token"), fields.get("keep")
        if isinstance(token, bytes) and len(token) == TOKEN and isinstance(keep, int | float) and keep > 0:
            self.token, self._keep = token, float(keep)
            self._worker.relieve(self)
            self._held().parking.keep_only(self.token, _live(fields))

    def _held(self) -> Serving:
        if self._serving is None:
            raise StageError("attach first")
        return self._serving

    def _profile(self, message: Message) -> NodeProfile:
        """What this machine was measured to do for models of the backend that the master names, or for any."""
        if self._worker.profile is None:
            raise StageError(f"{self._worker.name} has not been measured")
        return self._worker.profile(str(message.fields.get("backend", "")))

    def _stage(self, message: Message) -> LocalStage:
        stages = self._held().stages
        if message.stage >= len(stages):
            raise StageError(f"{self._worker.name} has no stage {message.stage}")
        return stages[message.stage]

    def _own(self, stage: int, session: int) -> int:
        own = self.sessions.get((stage, session))
        if own is None:
            raise StageError(f"session {session} is not open on {self._worker.name}")
        return own

    def _find(self, key: Key) -> int | None:
        """The session as the stage here knows it, taken back if it was kept for this master through the fall of a link."""
        own = self.sessions.get(key)
        if own is None and self.token and (own := self._held().parking.take(self.token, key)) is not None:
            self.sessions[key] = own
        return own

    def _open(self, link: Link, message: Message) -> None:
        stage, fields = self._stage(message), message.fields
        key = (message.stage, fields["session"])
        if key in self.sessions:
            raise StageError(f"session {fields['session']} is open already")
        if len(self.sessions) >= MAX_SESSIONS:
            raise StageError(f"more than {MAX_SESSIONS} sessions at once")
        spec = spec_from_fields(fields["spec"])
        parent = None if fields["parent"] is None else self._find((message.stage, fields["parent"]))
        own = next(_session_numbers)
        kept = stage.open(own, spec, parent, fields["length"])
        self.sessions[key] = own
        if message.request:
            link.answer(message, Type.LENGTH, {"length": kept})

    def _close(self, message: Message) -> None:
        own = self._find(key := (message.stage, message.fields["session"]))
        if own is not None:
            self._stage(message).close(own)
            del self.sessions[key]

    def _forward(self, message: Message, body: memoryview) -> None:
        stage, tensors = self._stage(message), message.tensors(body)
        rows = tuple(Row(self._own(message.stage, r.session), r.position, r.length, r.want, r.rewind) for r in message.rows)
        batch = Batch(rows, inputs_of(stage.reads, tensors))
        pending = stage.submit(batch)
        if isinstance(pending.error, CapacityError) and self._held().parking.give_up():
            pending = stage.submit(batch)
        pending.when_done(lambda done: self.hops.deliver(message, tensors, done))

    def take_over(self, stage: int, message: Message, body: memoryview) -> None:
        """A batch that another worker hands over, for the stage its ticket was given for. Failures are the master's to know.

        Raises ProtocolError, which ends that worker's link, for anything else.
        """
        if message.type is not Type.FORWARD or message.stage != stage or not message.request & CHAINED:
            raise ProtocolError(f"a hand-over to stage {stage} does not bring {message.type.name}")
        self.handle(self.link, message, body)

    def _call(self, link: Link, message: Message, body: memoryview) -> None:
        fields, serving = message.fields, self._held()
        component = serving.components.get(fields["layer"])
        if component is None:
            raise StageError(f"{self._worker.name} does not serve {fields['layer']!r}")
        fresh, tensors = split_buffers(message, body, [entry[0] for entry in fields["constants"]])
        constants = self._constants.remember(fields["image"], fields["ids"], fresh)
        began = time.perf_counter()
        with serving.component_lock:
            result = component.call(fields["method"], fields["image"], tensors, fields["scalars"], constants)
        listed, buffers = tensor_fields(result)
        answer = {"tensors": listed, "seconds": time.perf_counter() - began}
        link.answer(message, Type.RESULT, answer, buffers)

    def _release_image(self, image: int, layer: str) -> None:
        self._constants.forget(image)
        serving = self._held()
        component = serving.components.get(layer)
        if component is not None:
            with serving.component_lock:
                component.close(image)

    def release(self) -> None:
        """Frees what the master left behind, but for sessions that wait a while for it; it may attach again afterwards."""
        self.hops.release()
        serving = self._serving
        if serving is None:
            return
        sessions, self.sessions = self.sessions, {}
        serving.parking.park(self.token, sessions, self._keep)
        for image, layer in itertools.product(self._constants.images, serving.components):
            self._release_image(image, layer)
        self._serving = None


def _listed(stages: Sequence[Sequence[str]]) -> str:
    return " | ".join(", ".join(compress(tuple(str(layer) for layer in layers))) for layers in stages) or "nothing"


def _live(fields: Mapping[str, Any]) -> Collection[Key] | None:
    """The sessions that a master still wants; None where it does not say."""
    live = fields.get("live")
    if not isinstance(live, list) or not all(isinstance(sessions, list) for sessions in live):
        return None
    return {(stage, number) for stage, sessions in enumerate(live) for number in sessions if isinstance(number, int)}


def _probe(link: Link, message: Message) -> None:
    """Answers; when asked to it sweeps the caches first, so that the next one measures the link as a decode step finds it."""
    if message.fields.get("sweep") is True:
        sweep(LITTLE)()
    link.answer(message, Type.PROBED, {})
