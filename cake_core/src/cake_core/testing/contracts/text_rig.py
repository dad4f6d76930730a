"""What the text kit works with: stages in a row, driven as an engine drives them, and fixtures to override."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain, pairwise
from typing import ClassVar

import pytest

from cake_core.checkpoint import Checkpoint
from cake_core.model import (
    NOTHING,
    SAMPLE,
    Batch,
    LoadOptions,
    ModelInfo,
    Row,
    SessionSpec,
    Tensor,
    TextBackend,
    TextStage,
    Want,
    float32_values,
    int32_tensor,
    int32_values,
)
from cake_core.requests import SamplingParams
from cake_core.testing.contracts.threads import PATIENCE

GREEDY = SamplingParams(temperature=0)
SEEDED = SamplingParams(temperature=1.0, top_k=40, seed=1234567890123)


class Chain:
    """Stages that hold a model between them, one after another."""

    def __init__(self, stages: Sequence[TextStage]) -> None:
        self.stages = stages

    def open(self, session: int, spec: SessionSpec, parent: int | None = None, length: int = 0) -> int:
        """The positions that every stage has; those that had more go back to it."""
        kept = [stage.open(session, spec, parent, length) for stage in self.stages]
        return min(kept) if len(set(kept)) == 1 else self.truncate(session, min(kept))

    def truncate(self, session: int, length: int) -> int:
        while len(set(kept := [stage.truncate(session, length) for stage in self.stages])) > 1:
            length = min(kept)
        return kept[0]

    def close(self, session: int) -> None:
        for stage in self.stages:
            stage.close(session)

    def forward(self, rows: Sequence[Row], tokens: Sequence[Sequence[int]], targets: Sequence[int] = ()) -> Batch:
        """One batch through all stages; `tokens` has one sequence a row."""
        flat, hidden = int32_tensor(list(chain.from_iterable(tokens))), None
        for stage in self.stages:
            tensors: dict[str, Tensor] = {}
            if "model.embed_tokens" in stage.layers or "lm_head" in stage.layers:
                tensors["tokens"] = flat
            if hidden is not None:
                tensors["hidden"] = hidden
            if targets and "lm_head" in stage.layers:
                tensors["targets"] = int32_tensor(targets)
            answer = stage.submit(Batch(tuple(rows), tensors)).result(PATIENCE)
            hidden = answer.tensors.get("hidden")
        return answer

    def feed(self, session: int, position: int, tokens: Sequence[int], want: Want = NOTHING) -> Batch:
        """One row."""
        return self.forward([Row(session, position, len(tokens), want)], [tokens])

    def prefill(self, session: int, tokens: Sequence[int], start: int = 0, chunk: int = 1 << 30) -> int:
        """Forwards `tokens[start:]` in chunks; returns the token drawn after the last."""
        for position in range(start, len(tokens), chunk):
            last = position + chunk >= len(tokens)
            answer = self.feed(session, position, tokens[position : position + chunk], SAMPLE if last else NOTHING)
        return drawn(answer)[0]

    def extend(self, session: int, tokens: list[int], count: int) -> list[int]:
        """Draws `count` more; the last of `tokens` has been drawn and not yet forwarded. Returns all of them."""
        for _ in range(count):
            tokens = [*tokens, drawn(self.feed(session, len(tokens) - 1, tokens[-1:], SAMPLE))[0]]
        return tokens

    def generate(self, prompt: Sequence[int], sampling: SamplingParams, count: int, session: int = 1) -> list[int]:
        """`count` tokens after `prompt`, in a session of its own that is closed again."""
        self.open(session, SessionSpec(sampling, len(prompt)))
        tokens = self.extend(session, [*prompt, self.prefill(session, prompt)], count - 1)
        self.close(session)
        return tokens[len(prompt) :]

    def shutdown(self) -> None:
        for stage in self.stages:
            stage.shutdown()


def drawn(batch: Batch) -> list[int]:
    return int32_values(batch.tensors["tokens"])


def rows_of(batch: Batch, name: str) -> list[list[float]]:
    """An f32 tensor's values as rows."""
    tensor = batch.tensors[name]
    width = tensor.shape[-1]
    values = float32_values(tensor)
    return [values[start : start + width] for start in range(0, len(values), width)] if width else []


def assert_close(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]], tolerance: float) -> None:
    """Largest difference at most `tolerance` of the largest expected value."""
    assert [len(row) for row in found] == [len(row) for row in expected]
    largest = max(abs(value) for row in expected for value in row)
    difference = max(abs(a - b) for rows in zip(found, expected, strict=True) for a, b in zip(*rows, strict=True))
    assert difference <= tolerance * largest, f"differs by {difference}, {difference / largest:.2e} of the largest value"


def cuts_of(names: Sequence[str]) -> list[list[tuple[str, ...]]]:
    """The whole, every cut in two, thirds and every layer alone."""
    count = len(names)
    sizes = [
        [count],
        *([k, count - k] for k in range(1, count)),
        [count // 3, count // 3, count - 2 * (count // 3)],
        [1] * count,
    ]
    edges = [[0, *accumulate(size for size in cut if size)] for cut in sizes]
    return [[tuple(names[a:b]) for a, b in pairwise(cut)] for cut in edges]


Load = Callable[..., Chain]


class TextRig:
    """Fixtures of the kit: a plugin's test class overrides `backend` and `checkpoint`, and `options` where it needs some."""

    tolerance: ClassVar[float] = 1e-4
    prompt_length: ClassVar[int] = 21
    answer_length: ClassVar[int] = 12

    @pytest.fixture
    def backend(self) -> TextBackend:
        raise NotImplementedError("the test class must have a fixture `backend` that returns the TextBackend")

    @pytest.fixture
    def checkpoint(self) -> Checkpoint:
        raise NotImplementedError("the test class must have a fixture `checkpoint`: a small model of the backend")

    @pytest.fixture
    def options(self) -> LoadOptions:
        return LoadOptions(dtype="f32", device="cpu")

    @pytest.fixture
    def info(self, backend: TextBackend, checkpoint: Checkpoint, options: LoadOptions) -> ModelInfo:
        return backend.describe(checkpoint, options)

    @pytest.fixture
    def load(self, backend: TextBackend, checkpoint: Checkpoint, info: ModelInfo, options: LoadOptions) -> Iterator[Load]:
        """`load()` gives the whole model as one stage, `load(cut)` one stage for each of the cut's runs of layers."""
        chains: list[Chain] = []

        def load(cut: Sequence[Sequence[str]] | None = None, options: LoadOptions = options) -> Chain:
            runs = cut or [[layer.name for layer in info.layers]]
            chains.append(Chain([backend.load(checkpoint, info, run, options) for run in runs]))
            return chains[-1]

        yield load
        for loaded in chains:
            loaded.shutdown()

    @pytest.fixture
    def prompt(self, info: ModelInfo) -> list[int]:
        return self.some_tokens(info, 0)

    def some_tokens(self, info: ModelInfo, which: int, length: int | None = None) -> list[int]:
        """A prompt of ids from all over the vocabulary, another for each `which`."""
        count = self.prompt_length if length is None else length
        return [(7919 * (which + 1) + 104729 * index * (which + 2)) % info.vocab_size for index in range(count)]
