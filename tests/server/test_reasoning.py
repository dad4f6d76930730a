"""Reasoning apart from the answer, whole and streamed, and given back to the template."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from cake_server.text.reasoning import ReasoningParser
from cake_server.tools.pieces import Content, PlainParser, Reasoning


def run(text: str, size: int, inside: bool = False) -> tuple[str, str]:
    parser = ReasoningParser(PlainParser(), inside)
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    pieces = [piece for part in parts for piece in parser.feed(part)] + list(parser.finish())
    thought = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    return thought, "".join(piece.text for piece in pieces if isinstance(piece, Content))


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize(
    ("text", "inside", "wanted"),
    [
        ("<think>\nhm\n</think>\n\nYes.", False, ("hm", "Yes.")),
        ("  <think>a < b</think>c", False, ("a < b", "c")),
        ("no <think> here", False, ("", "no <think> here")),
        ("<thin ice", False, ("", "<thin ice")),
        ("still\n</think>\nYes.", True, ("still", "Yes.")),
        ("never done", True, ("never done", "")),
        ("<think>cut", False, ("cut", "")),
        ("<thi", False, ("", "<thi")),
        ("", False, ("", "")),
    ],
)
def test_the_split(text: str, inside: bool, wanted: tuple[str, str], size: int) -> None:
    assert run(text, size, inside) == wanted


BODY = {"messages": [{"role": "user", "content": "hi"}]}


def test_both_names_carry_it(start: Any, scripted: Any) -> None:
    runtime, _ = scripted("<think>because</think>Yes.", template="{{ '<think></think>' }}")
    server = start(runtime)
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=BODY).json()
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["reasoning"], message["content"]) == ("because", "because", "Yes.")
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    text = httpx.post(f"{server.url}/v1/chat/completions", json={**BODY, "stream": True}).text
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in text.splitlines() if line.startswith("data: {")]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "because"
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "because"
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes."


def test_without_reasoning_in_the_template_nothing_is_split(start: Any, scripted: Any) -> None:
    runtime, _ = scripted("<think>because</think>Yes.")
    server = start(runtime)
    message = httpx.post(f"{server.url}/v1/chat/completions", json=BODY).json()["choices"][0]["message"]
    assert message["content"] == "<think>because</think>Yes."
    assert "reasoning" not in message
