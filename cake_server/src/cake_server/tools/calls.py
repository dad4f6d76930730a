"""Reading calls out of JSON (most families) and out of Qwen3-Coder's XML."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from typing import Any

_DECODER = json.JSONDecoder()
_BETWEEN = " \t\r\n,;"
_FUNCTION = re.compile(r"<function=([^>\s]+)\s*>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)\s*>(.*?)(?:</parameter>|\Z)", re.DOTALL)

Call = tuple[str, str]
"""A function's name, and its arguments as JSON text."""


def json_calls(text: str, known: Collection[str]) -> list[Call] | None:
    """The calls in one or several JSON values; None when it is anything else, or names a function there is none of."""
    calls = []
    try:
        for value in _values(text):
            call = as_call(value, known)
            if call is None:
                return None
            calls.append(call)
    except (ValueError, RecursionError):
        return None
    return calls or None


def _values(text: str) -> Iterator[Any]:
    position = 0
    while True:
        while position < len(text) and text[position] in _BETWEEN:
            position += 1
        if position == len(text):
            return
        value, position = _DECODER.raw_decode(text, position)
        yield from value if isinstance(value, list) else [value]


def as_call(value: Any, known: Collection[str]) -> Call | None:
    """`{"name", "arguments" | "parameters"}`, or the same under `function`."""
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name") or value.get("function")
    arguments: Any = next((value[key] for key in ("arguments", "parameters") if key in value), {})
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    if not isinstance(name, str) or name not in known or not isinstance(arguments, dict):
        return None
    return name, dumps(arguments)


def xml_calls(text: str, known: Collection[str]) -> list[Call] | None:
    """`<function=name><parameter=key>value</parameter></function>`; a value that reads as JSON is taken as JSON."""
    calls = []
    for match in _FUNCTION.finditer(text):
        if match[1] not in known:
            return None
        arguments = {name: _value(raw.strip("\n")) for name, raw in _PARAMETER.findall(match[2])}
        calls.append((match[1], dumps(arguments)))
    return calls or None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def mistral_calls(text: str, known: Collection[str]) -> list[Call] | None:
    """`[{"name", "arguments"}]`, or the newer `name[ARGS]{...}`, the latter once for each call."""
    calls: list[Call] = []
    for part in text.split("[TOOL_CALLS]"):
        part = part.strip()
        if not part:
            continue
        if part[0] in "[{":
            found = json_calls(part, known)
        else:
            name, brace, rest = part.replace("[ARGS]", "").partition("{")
            name = name.split("[CALL_ID]")[0].strip()
            found = json_calls(json.dumps({"name": name, "arguments": brace + rest}), known)
        if found is None:
            return None
        calls += found
    return calls or None


def body_calls(text: str, known: Collection[str]) -> list[Call] | None:
    """The body of a `<tool_call>`: JSON (Hermes, Qwen) or XML (Qwen3-Coder)."""
    return xml_calls(text, known) if "<function=" in text else json_calls(text, known)


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
