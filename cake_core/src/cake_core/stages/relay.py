"""Stages of one process, one after another, as one: what a node with several devices serves a run of layers with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from cake_core.errors import CakeError, RewindError
from cake_core.model import (
    SAMPLED,
    Batch,
    Memory,
    Pending,
    Row,
    SessionSpec,
    TextStage,
    int32_tensor,
    int32_values,
)
from cake_core.stages.inputs import EMBED, HEAD, carried, inputs_of, read_by


class Relay:
    """A `TextStage` that hands hidden states from part to part, each in its own dtype, and computes inside `submit`.

    A batch that fails in a later part is taken back from those before it, so that none of its sessions has changed.
    """

    def __init__(self, parts: Sequence[TextStage]) -> None:
        self.layers = tuple(chain.from_iterable(part.layers for part in parts))
        self._parts = tuple(parts)
        self._reads = tuple(read_by(part.layers) for part in parts)
        self._draws = EMBED in self.layers and HEAD in self.layers
        self._drawn: dict[int, tuple[int, int]] = {}
        """Of a session the position after what was computed, and the token drawn for it."""

    def open(self, session: int, spec: SessionSpec, parent: int | None = None, length: int = 0) -> int:
        within = replace(spec, wire_dtype="")
        opened: list[TextStage] = []
        kept = []
        try:
            for part in self._parts:
                kept.append(part.open(session, spec if part is self._parts[-1] else within, parent, length))
                opened.append(part)
        except BaseException:
            for part in opened:
                part.close(session)
            raise
        return self._agree(session, kept)

    def submit(self, batch: Batch) -> Pending:
        pending = Pending()
        try:
            pending.set(self._run(self._known(batch)))
        except CakeError as error:
            pending.fail(error)
        return pending

    def truncate(self, session: int, length: int) -> int:
        return self._agree(session, [part.truncate(session, length) for part in self._parts])

    def close(self, session: int) -> None:
        self._drawn.pop(session, None)
        for part in self._parts:
            part.close(session)

    def memory(self) -> Memory:
        """The parts added up; of the KV cache the tokens that every part has room for."""
        parts = [part.memory() for part in self._parts]
        cached = [part for part in parts if part.kv_tokens]
        return Memory(
            device=",".join(dict.fromkeys(part.device for part in parts)),
            dtype=",".join(dict.fromkeys(part.dtype for part in parts)),
            weights=sum(part.weights for part in parts),
            kv_tokens=min((part.kv_tokens for part in cached), default=0),
            kv_tokens_free=min((part.kv_tokens_free for part in cached), default=0),
            kv_bytes_per_token=sum(part.kv_bytes_per_token for part in cached),
        )

    def shutdown(self) -> None:
        self._drawn.clear()
        for part in self._parts:
            part.shutdown()

    def _agree(self, session: int, kept: Sequence[int]) -> int:
        """Has every part keep as many positions as the one that kept the fewest."""
        while len(set(kept)) > 1:
            least = min(kept)
            kept = [part.truncate(session, least) for part in self._parts]
        return kept[0]

    def _run(self, batch: Batch) -> Batch:
        tensors = batch.tensors
        for index, part in enumerate(self._parts):
            try:
                result = part.submit(Batch(batch.rows, inputs_of(self._reads[index], tensors))).result()
            except BaseException as error:
                self._take_back(batch.rows, index, error)
                raise
            tensors = {**carried(batch.tensors), **result.tensors}
        self._remember(result)
        return result

    def _take_back(self, rows: Sequence[Row], count: int, error: BaseException) -> None:
        """Has the first `count` parts forget a batch. Raises RewindError when one cannot go back just that far: then the
        sessions are shorter in all parts alike, and what is missing has to be computed again."""
        behind = []
        for row in rows if count else ():
            kept = [part.truncate(row.session, row.position) for part in self._parts[:count]]
            if min(kept) < row.position:
                behind.append((row, self.truncate(row.session, min(kept))))
        if behind:
            row, length = behind[0]
            raise RewindError(f"session {row.session} went back to {length} instead of {row.position}: {error}") from error

    def _known(self, batch: Batch) -> Batch:
        """The batch with SAMPLED replaced by what was drawn here; where nothing was, the first part refuses it."""
        if not self._draws or "tokens" not in batch.tensors:
            return batch
        tokens, start = int32_values(batch.tensors["tokens"]), 0
        if SAMPLED not in tokens:
            return batch
        for row in batch.rows:
            position, token = self._drawn.get(row.session, (-1, SAMPLED))
            if start < len(tokens) and tokens[start] == SAMPLED and position == row.position:
                tokens[start] = token
            start += row.length
        return Batch(batch.rows, {**batch.tensors, "tokens": int32_tensor(tokens)})

    def _remember(self, result: Batch) -> None:
        if not self._draws:
            return
        for row, share in zip(result.rows, result.split_results(), strict=True):
            self._drawn.pop(row.session, None)
            if row.want.sample:
                self._drawn[row.session] = row.position + row.length, int32_values(share.tensors["tokens"])[-1]
