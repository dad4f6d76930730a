"""Which rows go into the next batch: continuous batching, chunked prefill, decode first. Pure: no clock, no thread.

Rows of sequences that decode go first; what is left of the batch's positions goes to prompts, oldest first, at most one
chunk, so no stream waits longer than a chunk. With several stages the decoding sequences are spread over as many batches
as may be in flight, so that every stage has work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from cake_core.engine.ledger import Ledger
from cake_core.engine.prefix import PrefixCache
from cake_core.engine.sequence import Sequence
from cake_core.engine.speculator import Speculator
from cake_core.engine.step import Step, decode_want, prefill_want


@dataclass(frozen=True, slots=True)
class Limits:
    """`rows` decoding sequences at once, `chunk` prompt positions a batch, `depth` batches in flight, over which decoding
    sequences are spread unless they run `ahead`, `queue` requests waiting, `prefixes` ended sessions kept for prompts that
    begin alike.

    `pieces`: chunks that a prompt is cut into, so that all stages and the wires between them work on it at once, unless they
    would be shorter than `piece`. `chunks`: batches of prompts in flight while nobody decodes, who would wait behind them.

    `ahead`: a decoding sequence may be in two batches at once, the second with the token that the first will draw.
    """

    rows: int = 64
    chunk: int = 512
    depth: int = 1
    ahead: bool = False
    queue: int = 1024
    prefixes: int = 32
    pieces: int = 1
    piece: int = 64
    chunks: int = 0


class Scheduler:
    """Holds the waiting and the running sequences and the ledger; the engine does what it decides.

    `admit` moves waiting sequences to the running ones and lists them in `to_open`, with the session to start from;
    `to_close` lists sessions to be closed. Both are to be done, in that order, before the next call of `next`.
    """

    def __init__(self, limits: Limits, ledger: Ledger, speculator: Speculator | None = None) -> None:
        self.limits = limits
        self.speculator = speculator
        self.ledger = ledger
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.prefixes = PrefixCache(limits.prefixes)
        self.to_open: list[tuple[Sequence, tuple[int, int] | None]] = []
        self.to_close: list[int] = []
        self.preemptions = 0
        self._reading = 0
        self._decoding = 0
        """Batches in flight that decode. No more than `depth`: who comes to decode then joins one of these, and does not go
        in a batch of its own for ever after, which takes a stage as long as a large one."""

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def next(self) -> Step | None:
        """The next batch, or None when there is nothing that can go now."""
        step = Step()
        if self._decoding < max(1, self.limits.depth):
            self._decode(step)
        decoding = len(step.rows)
        step.decodes = decoding > 0
        self._decoding += step.decodes
        if self._reading < self._most_reading():
            self._prefill(step)
        step.reads = len(step.rows) > decoding
        self._reading += step.reads
        return step if step.rows else None

    def landed(self, step: Step) -> None:
        """A step that `next` gave is over, one way or another."""
        self._reading -= step.reads
        self._decoding -= step.decodes

    @property
    def most_in_flight(self) -> int:
        return max(1, self.limits.depth, self.limits.chunks)

    def _most_reading(self) -> int:
        """Batches of prompts in flight: as many as keep all stages busy, unless somebody who decodes waits behind them."""
        return max(1, self.limits.depth) if any(s.generated for s in self.running) else self.most_in_flight

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence here: its session is kept for its prefix, or closed and its blocks freed."""
        if self.speculator is not None:
            self.speculator.forget(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence not in self.running:
            return
        self.running.remove(sequence)
        session = sequence.session
        wanted = not (sequence.failed or sequence.unwanted)
        if session is None or not wanted or sequence.forwarded < self.ledger.block or self._is_unopened(sequence):
            self._drop_session(sequence)
            return
        sequence.session = None
        evicted = self.prefixes.add(session, sequence.tokens[: sequence.forwarded])
        if evicted is not None:
            self._close(evicted)

    def forget_prefixes(self) -> None:
        """Closes every kept session: a node that held some of their state was lost."""
        for session in self.prefixes.clear():
            self._close(session)

    def opened(self, sequence: Sequence, kept: int, donor: int | None) -> None:
        """A session of `to_open` is open and holds the first `kept` positions, `donor`'s if one was given."""
        if sequence.session is None:
            return
        sequence.forwarded = kept
        self.ledger.shrink(sequence.session, kept)
        if sequence.former is not None:
            sequence.former = None
            return
        sequence.cached = kept
        if donor is not None and self.prefixes.used_up(donor, kept):
            self._close(donor)

    def requeue(self, *sequences: Sequence) -> None:
        """Takes sequences that are running back to the head of the queue, to be computed again from their tokens."""
        for sequence in sequences:
            if sequence in self.running:
                self.running.remove(sequence)
                self._drop_session(sequence)
                sequence.restart()
                self.waiting.appendleft(sequence)

    def resume(self, *sequences: Sequence) -> None:
        """Has sequences go on in new sessions, from what the stages still hold of those they had: their route was lost."""
        for sequence in sequences:
            if sequence not in self.running or (sequence.former is not None and self._is_unopened(sequence)):
                continue
            session, certain = sequence.session, sequence.certain
            if session is None or (sequence.former is None and not certain):
                self.requeue(sequence)
                continue
            former = sequence.former or (session, certain)
            if sequence.former is not None:  # the session that was to follow is not open everywhere
                self.to_close.append(session)
            sequence.restart()
            sequence.former = former
            self.ledger.rename(session, sequence.start())
            self.to_open.append((sequence, former))

    def _drop_session(self, sequence: Sequence) -> None:
        if sequence.former is not None:
            self.to_close.append(sequence.former[0])
            sequence.former = None
        session = sequence.session
        if session is None:
            return
        if self._is_unopened(sequence):
            self.to_open = [entry for entry in self.to_open if entry[0] is not sequence]
            self.ledger.release(session)
        else:
            self._close(session)
        sequence.session = None

    def _is_unopened(self, sequence: Sequence) -> bool:
        return any(entry[0] is sequence for entry in self.to_open)

    def _close(self, session: int) -> None:
        self.ledger.release(session)
        self.to_close.append(session)

    def admit(self) -> None:
        """Starts waiting sequences, in order of arrival, while there is room for them."""
        while self.waiting and len(self.running) < self.limits.rows:
            head = self.waiting[0]
            # Room for the prompt and the first block of the answer, or it would be preempted at once.
            needed = self.ledger.blocks(len(head.tokens)) + 1
            donor = self._donor(head)
            while needed > self.ledger.free and (evicted := self.prefixes.evict()) is not None:
                self._close(evicted)
                donor = None if donor is None or donor[0] == evicted else donor
            if needed > self.ledger.free and self.running:
                return
            self.waiting.popleft()
            session = head.start()
            if donor is not None:
                self.ledger.take(session, donor[1])
            self.running.append(head)
            self.to_open.append((head, donor))

    def _donor(self, sequence: Sequence) -> tuple[int, int] | None:
        request = sequence.request
        if request.embed or request.score_prompt or not self.limits.prefixes:
            return None
        running = [(s.session, s.tokens[: s.forwarded]) for s in self.running if s.session and not self._is_unopened(s)]
        found = self.prefixes.find(sequence.tokens, running)
        # Less than a block saves nothing that the round trip to ask for it does not cost.
        return found if found is not None and found[1] >= self.ledger.block else None

    def _decode(self, step: Step) -> None:
        ready = [s for s in self.running if self._may_decode(s)]
        spread = 1 if self.limits.ahead else max(1, self.limits.depth)
        share = -(-sum(s.decoding or s.in_flight > 0 for s in self.running) // spread)
        ready.sort(key=lambda s: s.forwarded - s.prompt_length)
        chosen = ready[:share]
        guessed = self.speculator.guess(chosen) if self.speculator is not None else [[] for _ in chosen]
        for sequence, guesses in zip(chosen, guessed, strict=True):
            session = sequence.session
            if session is None or not self._make_room(sequence, sequence.forwarded + 1):
                continue
            # Nobody is preempted for a guess.
            length = 1 + len(guesses)
            if not self.ledger.fits(session, sequence.forwarded + length):
                guesses, length = [], 1
            self.ledger.take(session, sequence.forwarded + length)
            sequence.guesses = guesses
            step.add(sequence, length, decode_want(sequence, length))

    def _may_decode(self, sequence: Sequence) -> bool:
        if sequence.unwanted or sequence.ended:
            return False
        return (sequence.decoding and not sequence.in_flight) or (self.limits.ahead and sequence.may_run_ahead)

    def _prefill(self, step: Step) -> None:
        budget = max(1, self.limits.chunk - step.positions)
        for sequence in sorted(self.running, key=lambda s: s.order):
            if budget <= 0:
                return
            if sequence.unwanted or sequence.session is None or sequence.decoding or sequence.remaining <= 0:
                continue
            piece = max(self.limits.piece, -(-len(sequence.tokens) // self.limits.pieces))
            length = min(budget, sequence.remaining, piece)
            if not self._make_room(sequence, sequence.forwarded + length):
                return
            want = prefill_want(sequence, length)
            budget -= length
            step.add(sequence, length, want)

    def _make_room(self, sequence: Sequence, positions: int) -> bool:
        """Takes blocks for `positions`, evicting kept prefixes and then preempting the youngest idle sequences if it must.

        False: not now.
        """
        session = sequence.session
        if session is not None and sequence.rewind:
            self.ledger.shrink(session, sequence.forwarded)
        while session is not None and not self.ledger.fits(session, positions):
            if (evicted := self.prefixes.evict()) is not None:
                self._close(evicted)
                continue
            victims = [s for s in self.running if not s.in_flight and s is not sequence and s.order > sequence.order]
            if not victims:
                return False
            self.preemptions += 1
            self.requeue(max(victims, key=lambda s: s.order))
        if session is None:
            return False
        self.ledger.take(session, positions)
        return True

    def stuck(self) -> Sequence | None:
        """The oldest sequence when nothing is in flight and it cannot go on: it does not fit even alone."""
        if not self.running or any(s.in_flight for s in self.running):
            return None
        oldest = min(self.running, key=lambda s: s.order)
        others = [s for s in self.running if s is not oldest]
        for other in sorted(others, key=lambda s: -s.order):
            self.requeue(other)
        return oldest if not others else None

    def sequences(self) -> Iterable[Sequence]:
        return [*self.running, *self.waiting]
