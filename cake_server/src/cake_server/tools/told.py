"""Tools for models whose chat template says nothing of them: told in words, calls and results as plain messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Messages = list[dict[str, Any]]


def knows_tools(template: str) -> bool:
    """Whether a template writes tools into the prompt. Of one that is not known, it is taken for granted."""
    return not template or "tools" in template


def tell(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> Messages:
    """Messages of a conversation with tools, in roles that every template has."""
    told = [_plain(message) for message in messages]
    if not tools:
        return told
    if not told or told[0]["role"] != "system":
        told.insert(0, {"role": "system", "content": "You are a helpful assistant."})
    told[0]["content"] = f"{told[0]['content']}\n\n{_listed(tools)}"
    return told


def _listed(tools: Sequence[Mapping[str, Any]]) -> str:
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    form = '{"name": "the function", "arguments": {"its parameter": "a value"}}'
    return f"You can call these functions:\n{functions}\nTo call one, answer with JSON and nothing else: {form}"


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"The function's result: {message['content']}"}
    calls = [call["function"] for call in message.get("tool_calls", ())]
    if not calls:
        return dict(message)
    said = [message["content"], *(json.dumps(call, ensure_ascii=False) for call in calls)]
    return {"role": message["role"], "content": "\n".join(filter(None, said))}
