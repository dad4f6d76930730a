"""`tools` and `tool_choice`: the parser that reads the answer, and the grammar that forces one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cake_core.errors import RequestError
from cake_core.model import Tokenizer
from cake_server.schemas.chat import ChatRequest, NamedTool, Tool
from cake_server.text.grammar import schema_grammar
from cake_server.tools.calls import body_calls, json_calls, mistral_calls
from cake_server.tools.parsers import EitherParser, ForcedParser, JsonAnswerParser, RequiredParser, TaggedParser
from cake_server.tools.pieces import Parser, PlainParser

MAX_TOOLS = 128


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How one request uses tools.

    `tools` go into the prompt; `parser()` makes a fresh parser an answer; `grammar` forces a call; `show_special`: the
    family's tags are special tokens, so text must come with them.
    """

    tools: Sequence[Tool] = ()
    parser: Callable[[], Parser] = PlainParser
    grammar: str | None = None
    show_special: bool = False


NO_TOOLS = ToolUse()


def tool_use(body: ChatRequest, tokenizer: Tokenizer) -> ToolUse:
    tools, choice = body.tools or [], body.tool_choice
    if not tools:
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice needs tools", "tool_choice")
        return NO_TOOLS
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"at most {MAX_TOOLS} tools, not {len(tools)}", "tools")
    names = [tool.function.name for tool in tools]
    if isinstance(choice, NamedTool):
        return _named(tools, choice.function.name)
    if choice == "none":
        return NO_TOOLS
    if choice == "required":
        grammar = schema_grammar(_calls_schema(tools, body.parallel_tool_calls is not False), "tools", strict=False)
        return ToolUse(tools, lambda: RequiredParser(names), grammar)
    if choice in (None, "auto"):
        return _auto(tools, names, tokenizer)
    raise RequestError(f"tool_choice is none, auto, required or a function, not {choice!r}", "tool_choice")


def _named(tools: Sequence[Tool], name: str) -> ToolUse:
    for index, tool in enumerate(tools):
        if tool.function.name == name:
            grammar = schema_grammar(_parameters(tool), f"tools[{index}].function.parameters", strict=False)
            return ToolUse(tools, lambda: ForcedParser(name), grammar)
    raise RequestError(f"tool_choice names {name!r}, which is not among tools", "tool_choice.function.name")


def _parameters(tool: Tool) -> Mapping[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}}


def _calls_schema(tools: Sequence[Tool], several: bool) -> Mapping[str, Any]:
    call = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": _parameters(tool)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return {"type": "array", "minItems": 1, "maxItems": 16 if several else 1, "items": {"anyOf": call}}


def _auto(tools: Sequence[Tool], names: Sequence[str], tokenizer: Tokenizer) -> ToolUse:
    template = chat_template(tokenizer)
    if "[TOOL_CALLS]" in template:
        return _tagged(tools, tokenizer, "[TOOL_CALLS]", lambda: TaggedParser("[TOOL_CALLS]", None, mistral_calls, names))
    if "<tool_call>" in template:
        return _tagged(tools, tokenizer, "<tool_call>", lambda: TaggedParser("<tool_call>", "</tool_call>", body_calls, names))
    if "<|python_tag|>" in template or "ipython" in template:
        tag = "<|python_tag|>"
        return _tagged(tools, tokenizer, tag, lambda: EitherParser(TaggedParser(tag, None, json_calls, names), names))
    return ToolUse(tools, lambda: JsonAnswerParser(names))


def _tagged(tools: Sequence[Tool], tokenizer: Tokenizer, tag: str, parser: Callable[[], Parser]) -> ToolUse:
    ids = tokenizer.encode(tag, add_special=False)
    hidden = len(ids) == 1 and not tokenizer.decode(ids)
    return ToolUse(tools, parser, show_special=hidden)


def chat_template(tokenizer: Tokenizer) -> str:
    """The template's text, as far as the model's files have it; families are told apart by the tags it writes."""
    template = tokenizer.describe().get("chat_template", "")
    if isinstance(template, list):  # several named ones
        return "\n".join(str(entry.get("template", "")) for entry in template if isinstance(entry, Mapping))
    return template if isinstance(template, str) else ""
