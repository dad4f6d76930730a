"""Tool calls: each family's text, split anywhere, gives the same calls; forced ones; the way over HTTP and back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from cake_server.tools.calls import body_calls, json_calls, mistral_calls
from cake_server.tools.parsers import EitherParser, ForcedParser, JsonAnswerParser, RequiredParser, TaggedParser
from cake_server.tools.pieces import CallArguments, CallStart, Content, Parser, held_back

CHAT = "/v1/chat/completions"
KNOWN = ("weather", "time")
WEATHER = '{"name": "weather", "arguments": {"city": "Köln \\"x\\""}}'
ARGUMENTS = {"city": 'Köln "x"'}

Result = tuple[str, list[tuple[str, Any]]]


def hermes() -> Parser:
    return TaggedParser("<tool_call>", "</tool_call>", body_calls, KNOWN)


def mistral() -> Parser:
    return TaggedParser("[TOOL_CALLS]", None, mistral_calls, KNOWN)


def llama() -> Parser:
    return EitherParser(TaggedParser("<|python_tag|>", None, json_calls, KNOWN), KNOWN)


def generic() -> Parser:
    return JsonAnswerParser(KNOWN)


def required() -> Parser:
    return RequiredParser(KNOWN)


def run(parser: Parser, text: str, size: int) -> Result:
    """Content, and calls with parsed arguments, of `text` fed `size` characters at a time."""
    content, calls = "", dict[int, list[str]]()
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    for piece in [piece for part in parts for piece in parser.feed(part)] + list(parser.finish()):
        if isinstance(piece, Content):
            content += piece.text
        elif isinstance(piece, CallStart):
            calls[piece.index] = [piece.name, ""]
        elif isinstance(piece, CallArguments):
            calls[piece.index][1] += piece.text
    return content, [(name, json.loads(arguments)) for name, arguments in calls.values()]


CALL = ("weather", ARGUMENTS)
TAGGED = f"<tool_call>{WEATHER}</tool_call>"
UNKNOWN = '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'
XML = "<function=weather>\n<parameter=city>\nBonn\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>"
CASES: list[tuple[Callable[[], Parser], str, Result]] = [
    (hermes, f"<tool_call>\n{WEATHER}\n</tool_call>", ("", [CALL])),
    (hermes, f"Let me see.\n\n{TAGGED}\n{TAGGED}", ("Let me see.", [CALL, CALL])),
    (hermes, f"<tool_call>{WEATHER}", ("", [CALL])),
    (hermes, "no call < at all <tool", ("no call < at all <tool", [])),
    (hermes, "<tool_call>broken {</tool_call> after", ("<tool_call>broken {</tool_call> after", [])),
    (hermes, UNKNOWN, (UNKNOWN, [])),
    (hermes, f"<tool_call>\n{XML}\n</tool_call>", ("", [("weather", {"city": "Bonn", "days": 3})])),
    (hermes, "blanks at the end  \n", ("blanks at the end  \n", [])),
    (mistral, f"[TOOL_CALLS][{WEATHER}, {WEATHER}]", ("", [CALL, CALL])),
    (mistral, '[TOOL_CALLS]weather[ARGS]{"a": 1}[TOOL_CALLS]time[ARGS]{}', ("", [("weather", {"a": 1}), ("time", {})])),
    (mistral, "plain [TOOL text", ("plain [TOOL text", [])),
    (llama, '{"name": "time", "parameters": {}}', ("", [("time", {})])),
    (llama, f"<|python_tag|>{WEATHER}; {WEATHER}", ("", [CALL, CALL])),
    (llama, '{"answer": 42}', ('{"answer": 42}', [])),
    (llama, "It is late.", ("It is late.", [])),
    (generic, f"```json\n{WEATHER}\n```", ("", [CALL])),
    (generic, "```python\nprint()\n```", ("```python\nprint()\n```", [])),
    (generic, f"[{WEATHER}]", ("", [CALL])),
    (generic, '{"name": "nobody"}', ('{"name": "nobody"}', [])),
    (generic, "{not json", ("{not json", [])),
    (generic, "", ("", [])),
    (required, f"[{WEATHER}, {WEATHER}]", ("", [CALL, CALL])),
    (required, f"[{WEATHER}", ("", [CALL])),
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("make", "text", "wanted"), CASES)
def test_calls_are_found_however_the_text_is_split(make: Callable[[], Parser], text: str, wanted: Result, size: int) -> None:
    assert run(make(), text, size) == wanted


def test_ordinary_text_is_not_held_back() -> None:
    parser = hermes()
    assert list(parser.feed("Hello")) == [Content("Hello")]
    assert list(parser.feed(" there")) == [Content(" there")]
    plain = generic()
    assert list(plain.feed("Hello")) == [Content("Hello")]


def test_json_that_is_no_call_flows_as_soon_as_its_first_key_shows_it() -> None:
    parser = generic()
    assert list(parser.feed('{"answ')) == []
    assert list(parser.feed('er": ')) == [Content('{"answer": ')]
    assert list(parser.feed("42")) == [Content("42")]


def test_a_forced_call_streams_its_arguments() -> None:
    parser = ForcedParser("weather")
    start, first = list(parser.feed('{"ci'))
    assert isinstance(start, CallStart)
    assert start.name == "weather"
    assert first == CallArguments(0, '{"ci')
    assert list(parser.feed('ty": 1}')) == [CallArguments(0, 'ty": 1}')]


def test_held_back() -> None:
    assert held_back("abc<to", ("<tool_call>",)) == 3
    assert held_back("abc", ("<tool_call>",)) == 0
    assert held_back("<tool_call", ("<tool_call>",)) == 10


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "d",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
ASK = {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}


def test_a_model_whose_template_has_no_tools_is_told_in_words(start: Any, scripted: Any) -> None:
    """And answers with JSON; the history's calls and results become messages of roles that it has."""
    runtime, engine = scripted(WEATHER, template="{% for message in messages %}{{ message.content }}{% endfor %}")
    server = start(runtime)
    history = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]},
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
    ]
    choice = httpx.post(server.url + CHAT, json={**ASK, "messages": history}).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == ARGUMENTS
    prompt = runtime.tokenizer.decode(engine.requests[0].prompt, skip_special=False)
    system, user, assistant, result = re.findall(r"<\|(?:system|user|assistant)\|>(.*?)<\|end\|>", prompt, re.DOTALL)
    assert '"name": "weather"' in system
    assert "answer with JSON" in system
    assert user == "hi"
    assert json.loads(assistant) == {"name": "weather", "arguments": {"city": "Rome"}}
    assert "sunny" in result


def test_a_system_message_keeps_its_place_before_the_tools(start: Any, scripted: Any) -> None:
    runtime, engine = scripted("ok", template="{{ messages }}")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    httpx.post(start(runtime).url + CHAT, json={**ASK, "messages": messages}).raise_for_status()
    prompt = runtime.tokenizer.decode(engine.requests[0].prompt, skip_special=False)
    assert prompt.index("Be brief.") < prompt.index("weather")
    assert prompt.count("<|system|>") == 1


def test_a_call_over_http(start: Any, scripted: Any) -> None:
    runtime, _ = scripted(f"<tool_call>\n{WEATHER}\n</tool_call>", template="... <tool_call> ...")
    server = start(runtime)
    choice = httpx.post(server.url + CHAT, json=ASK).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == ARGUMENTS


def test_a_call_in_a_stream_has_the_shape_of_openais(start: Any, scripted: Any) -> None:
    runtime, _ = scripted(f"<tool_call>\n{WEATHER}\n</tool_call>", template="<tool_call>")
    server = start(runtime)
    text = httpx.post(server.url + CHAT, json={**ASK, "stream": True}).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    first = deltas[1]["tool_calls"][0]
    assert first == {"index": 0, "id": first["id"], "type": "function", "function": {"name": "weather", "arguments": ""}}
    fragments = [delta["tool_calls"][0] for delta in deltas[2:-1]]
    assert all(set(fragment) == {"index", "function"} for fragment in fragments)
    assert json.loads("".join(fragment["function"]["arguments"] for fragment in fragments)) == ARGUMENTS
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_forced_call_carries_a_grammar_of_its_arguments(start: Any, scripted: Any) -> None:
    runtime, engine = scripted('{"city": "Bonn"}')
    server = start(runtime)
    body = {**ASK, "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    message = httpx.post(server.url + CHAT, json=body).json()["choices"][0]["message"]
    assert message["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Bonn"}'}
    grammar = json.loads(engine.requests[0].grammar)
    assert grammar["grammars"][0]["json_schema"]["required"] == ["city"]


def test_required_calls_carry_a_grammar_of_all_tools(start: Any, scripted: Any) -> None:
    runtime, engine = scripted(f"[{WEATHER}]")
    server = start(runtime)
    body = {**ASK, "tool_choice": "required", "parallel_tool_calls": False}
    choice = httpx.post(server.url + CHAT, json=body).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"
    schema = json.loads(engine.requests[0].grammar)["grammars"][0]["json_schema"]
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)


def test_tool_choice_none_offers_nothing(start: Any, scripted: Any) -> None:
    runtime, engine = scripted(f"<tool_call>{WEATHER}</tool_call>", template="<tool_call>")
    server = start(runtime)
    message = httpx.post(server.url + CHAT, json={**ASK, "tool_choice": "none"}).json()["choices"][0]["message"]
    assert message["content"].startswith("<tool_call>")
    assert engine.requests[0].grammar is None


def test_the_round_trip_reaches_the_template_with_arguments_as_an_object(api: httpx.Client) -> None:
    messages = [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bonn"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    response = api.post("/apply-template", json={"messages": messages, "tools": TOOLS})
    assert response.status_code == 200
    assert "sunny" in response.json()["prompt"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice.function.name"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [{"type": "browser", "function": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": TOOLS * 200}, "tools"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]},
                ]
            },
            "messages[0].tool_calls",
        ),
    ],
)
def test_wrong_tools_are_named(api: httpx.Client, change: dict[str, Any], param: str) -> None:
    response = api.post(CHAT, json={**ASK, **change})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
