"""Response formats become llguidance grammars; what cannot be compiled is a 400 that names the field."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from cake_server.schemas.common import JsonSchemaSpec, ResponseFormat, SamplingFields
from cake_server.text.grammar import answer_grammar, depth

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def grammar(**fields: Any) -> Any:
    text = answer_grammar(SamplingFields(**fields))
    return None if text is None else json.loads(text)["grammars"][0]


def test_formats() -> None:
    assert grammar() is None
    assert grammar(response_format=ResponseFormat("text")) is None
    assert grammar(response_format=ResponseFormat("json_object"))["json_schema"]["type"] == "object"
    spec = JsonSchemaSpec(name="x", schema=SCHEMA)
    for fields in (
        {"response_format": ResponseFormat("json_schema", spec)},
        {"response_format": ResponseFormat("json_object", schema=SCHEMA)},
        {"json_schema": SCHEMA},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
    ):
        found = grammar(**fields)["json_schema"]
        assert found["required"] == ["a"]
        assert found["x-guidance"]["whitespace_flexible"] is False
    assert "lark_grammar" in grammar(structured_outputs={"regex": "[0-9]+"})
    assert "yes" in grammar(structured_outputs={"choice": ["yes", "no"]})["lark_grammar"]
    assert "lark_grammar" in grammar(grammar='root ::= "yes" | "no"')
    assert "lark_grammar" in grammar(grammar='start: "yes" | "no"')


UNSUPPORTED = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}


def nested(levels: int) -> Any:
    return {"type": "array", "items": nested(levels - 1)} if levels else {"type": "integer"}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": UNSUPPORTED}}}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": {"type": "thing"}}}, "response_format"),
        ({"json_schema": nested(100)}, "json_schema"),
        ({"json_schema": {"enum": ["x" * 200_000]}}, "json_schema"),
        ({"grammar": "start: ("}, "grammar"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"grammar": 'start: "x"', "json_schema": SCHEMA}, "grammar"),
    ],
)
def test_what_cannot_be_enforced_is_named(api: httpx.Client, change: dict[str, Any], param: str) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, **change}
    response = api.post("/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_a_schema_that_is_not_strict_keeps_what_can_be_enforced() -> None:
    spec = JsonSchemaSpec(name="x", schema=UNSUPPORTED, strict=False)
    assert grammar(response_format=ResponseFormat("json_schema", spec))["json_schema"]["x-guidance"]["lenient"] is True


def test_the_grammar_reaches_the_engine(start: Any, scripted: Any) -> None:
    runtime, engine = scripted('{"a": 1}')
    server = start(runtime)
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}},
    }
    assert httpx.post(f"{server.url}/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == '{"a": 1}'
    assert json.loads(engine.requests[0].grammar)["grammars"][0]["json_schema"]["required"] == ["a"]


def test_depth_needs_no_recursion() -> None:
    bomb: Any = 1
    for _ in range(50_000):
        bomb = [bomb]
    assert depth(bomb) == 50_001
    while isinstance(bomb, list):  # taken apart by hand: freeing it would recurse
        bomb = bomb.pop()
