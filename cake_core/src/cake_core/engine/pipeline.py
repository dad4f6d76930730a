"""The stages of a model, one after another. A batch is carried from stage to stage by whoever completed it: the calling
thread, or the thread that read a worker's answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from cake_core.errors import CakeError, StageError
from cake_core.model import Batch, Memory, Pending, SessionSpec, Tensor
from cake_core.stages import Stage

EMBED = "model.embed_tokens"
HEAD = "lm_head"

Done = Callable[[Batch | None, CakeError | None], None]


class Pipeline:
    """Runs batches through all stages. Stages serve in order, so batches do not overtake one another."""

    def __init__(self, stages: Sequence[Stage], wire_dtype: str = "") -> None:
        self.stages = tuple(stages)
        self.wire_dtype = wire_dtype
        self.runs_ahead = len(self.stages) == 1 and self.stages[0].runs_ahead
        self._wants_tokens = [EMBED in s.layers or HEAD in s.layers for s in self.stages]
        self._has_head = [HEAD in s.layers for s in self.stages]

    def submit(self, batch: Batch, done: Done) -> None:
        """Sends a batch on its way; `done(result, error)` is called once, from whichever thread completes it."""
        self._run(0, batch, batch, done)

    def _run(self, index: int, batch: Batch, origin: Batch, done: Done) -> None:
        while index < len(self.stages):
            pending = self.stages[index].submit(batch)
            if not pending.done():
                pending.when_done(partial(self._continue, index + 1, origin, done))
                return
            try:
                batch = self._following(index, pending.result(), origin)
            except Exception as error:
                done(None, _expected(error))
                return
            index += 1
        done(batch, None)

    def _continue(self, index: int, origin: Batch, done: Done, pending: Pending) -> None:
        try:
            batch = self._following(index - 1, pending.result(), origin)
        except Exception as error:
            done(None, _expected(error))
            return
        self._run(index, batch, origin, done)

    def _following(self, index: int, result: Batch, origin: Batch) -> Batch:
        """What the stage after `index` gets: the hidden states, and tokens and targets where they are used."""
        if index + 1 == len(self.stages):
            return result
        tensors: dict[str, Tensor] = {"hidden": result.tensors["hidden"]}
        if self._wants_tokens[index + 1]:
            tensors["tokens"] = origin.tensors["tokens"]
        if self._has_head[index + 1] and "targets" in origin.tensors:
            tensors["targets"] = origin.tensors["targets"]
        return Batch(origin.rows, tensors)

    def open(self, session: int, spec: SessionSpec, parent: int | None = None, length: int = 0) -> int:
        """Opens a session on every stage; returns the positions that all of them really have.

        A stage that kept more than another is cut back, so they agree.
        """
        kept = [stage.open(session, spec, parent, length) for stage in self.stages]
        return self._agree(session, kept)

    def truncate(self, session: int, length: int) -> int:
        kept = [stage.truncate(session, length) for stage in self.stages]
        return self._agree(session, kept)

    def _agree(self, session: int, kept: list[int]) -> int:
        least = min(kept)
        if any(length != least for length in kept):
            again = [stage.truncate(session, least) for stage in self.stages]
            return least if set(again) == {least} else self._agree(session, again)
        return least

    def close(self, session: int) -> None:
        for stage in self.stages:
            stage.close(session)

    def memory(self) -> list[Memory]:
        return [stage.memory() for stage in self.stages]

    def kv_tokens(self) -> int:
        """Positions of KV cache on the tightest stage that has one; 0 when none has."""
        return min((m.kv_tokens for m in self.memory() if m.kv_tokens), default=0)


def _expected(error: Exception) -> CakeError:
    return error if isinstance(error, CakeError) else StageError(f"{type(error).__name__}: {error}")
