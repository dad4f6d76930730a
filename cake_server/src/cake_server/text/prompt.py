"""Chat messages to prompt ids, through the model's own template."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from cake_core.errors import RequestError
from cake_core.model import Tokenizer
from cake_server.schemas.chat import ChatRequest, ContentPart, MessageIn, Tool
from cake_server.tools.choice import chat_template
from cake_server.tools.told import knows_tools, tell

_ROLES = {"developer": "system", "function": "tool"}
_KNOWN = ("system", "user", "assistant", "tool")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_LONG = 20_000
"""Characters above which the tokenizer runs in a thread, so that other streams do not wait for it."""


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str
    ids: tuple[int, ...]


def messages_for_template(messages: Sequence[MessageIn]) -> list[dict[str, Any]]:
    """Messages as templates expect them: plain text content, arguments as mappings (half of them break on JSON text)."""
    if not messages:
        raise RequestError("messages must have at least one message", "messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: MessageIn, where: str) -> dict[str, Any]:
    role = message.role.lower()  # the seed's own clients wrote System, User and Assistant
    role = _ROLES.get(role, role)
    if role not in _KNOWN:
        raise RequestError(f"{where}.role is system, developer, user, assistant or tool, not {message.role!r}", f"{where}.role")
    result: dict[str, Any] = {"role": role, "content": _content(message.content, where)}
    if message.name is not None:
        result["name"] = message.name
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    reasoning = message.reasoning_content or message.reasoning
    if reasoning and role == "assistant":
        result["reasoning_content"] = result["reasoning"] = reasoning
    if message.tool_calls:
        result["tool_calls"] = [
            {
                "id": call.id or f"call_{index}",
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments, where)},
            }
            for index, call in enumerate(message.tool_calls)
        ]
    return result


def _content(content: str | list[ContentPart] | None, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for index, part in enumerate(content):
        if part.type not in _TEXT_PARTS:
            param = f"{where}.content[{index}].type"
            raise RequestError(f"this model reads text only; a part of type {part.type!r} cannot be used", param)
        texts.append(part.text or part.refusal or "")
    return "\n".join(texts)


def _arguments(arguments: str | dict[str, Any] | None, where: str) -> Mapping[str, Any]:
    if isinstance(arguments, dict):
        return arguments
    try:
        value = json.loads(arguments) if arguments else {}
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}.tool_calls: arguments are not valid JSON", f"{where}.tool_calls") from error
    if not isinstance(value, dict):
        raise RequestError(f"{where}.tool_calls: arguments must be a JSON object", f"{where}.tool_calls")
    return value


def template_options(body: ChatRequest) -> dict[str, Any]:
    """Switches of the template: what was asked, with `reasoning_effort` as most templates know it."""
    options: dict[str, Any] = {}
    if body.reasoning_effort is not None:
        options["reasoning_effort"] = body.reasoning_effort
        if body.reasoning_effort == "none":
            options["enable_thinking"] = False
    if body.enable_thinking is not None:
        options["enable_thinking"] = body.enable_thinking
    options.update(body.chat_template_kwargs or {})
    return options


def tools_for_template(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    for index, tool in enumerate(tools):
        if tool.type != "function":
            raise RequestError(f"tools[{index}]: only functions are supported, not {tool.type!r}", f"tools[{index}].type")
    return [{"type": "function", "function": _without_none(msgspec.to_builtins(tool.function))} for tool in tools]


def _without_none(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if item is not None and key != "strict"}


def render(body: ChatRequest, tokenizer: Tokenizer, tools: Sequence[Tool]) -> str:
    if not tokenizer.has_chat_template:
        raise RequestError("this model has no chat template; use /v1/completions with a prompt", "messages")
    messages = messages_for_template(body.messages)
    options = template_options(body)
    listed = tools_for_template(tools)
    if not knows_tools(chat_template(tokenizer)):
        messages, listed = tell(messages, listed), []
    if not body.continue_final_message:
        prompt = body.add_generation_prompt is not False
        return tokenizer.render_chat(messages, tools=listed, add_generation_prompt=prompt, template_options=options)
    last = messages[-1]
    if last["role"] != "assistant" or body.add_generation_prompt:
        message = "continue_final_message needs an assistant message at the end and no add_generation_prompt"
        raise RequestError(message, "continue_final_message")
    text = tokenizer.render_chat(messages, tools=listed, add_generation_prompt=False, template_options=options)
    content = last["content"].strip()
    end = text.rfind(content)
    if end < 0:
        raise RequestError("the template changes the final message, so it cannot be continued", "continue_final_message")
    return text[: end + len(content)]


async def chat_prompt(body: ChatRequest, tokenizer: Tokenizer, tools: Sequence[Tool] = ()) -> Prompt:
    def work() -> Prompt:
        text = render(body, tokenizer, tools)
        return Prompt(text, tuple(tokenizer.encode(text, add_special=False)))

    size = sum(len(m.content) if isinstance(m.content, str) else _LONG for m in body.messages)
    return work() if size < _LONG else await asyncio.to_thread(work)


async def encode(tokenizer: Tokenizer, text: str, add_special: bool = True) -> tuple[int, ...]:
    if len(text) < _LONG:
        return tuple(tokenizer.encode(text, add_special=add_special))
    return tuple(await asyncio.to_thread(tokenizer.encode, text, add_special=add_special))
