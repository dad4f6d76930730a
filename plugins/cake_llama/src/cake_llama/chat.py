"""Chat templates: the model's own Jinja template over a conversation, rendered by minijinja.

A template comes from a downloaded file, so it is run as hostile: plain data in, no attributes of Python objects, a bounded
number of steps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cake_core.errors import RequestError

if TYPE_CHECKING:
    import minijinja

    from cake_core.requests import Message

FUEL = 20_000_000
"""Template instructions one rendering may take: enough for thousands of messages, and a few seconds at most."""

_GENERATION = re.compile(r"(\{%[-+]?)\s*(end)?generation\s*([-+]?%\})")


class ChatTemplate:
    """The templates of one model by name (`default`, `tool_use`), and the special tokens they may use.

    Args:
        tokens: `bos_token`, `eos_token` and their like, as text.
        clock: what `strftime_now` formats.
    """

    def __init__(
        self, templates: Mapping[str, str], tokens: Mapping[str, str], clock: Callable[[], datetime] = datetime.now
    ) -> None:
        self.templates = templates
        self._tokens = tokens
        self._clock = clock

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. Raises RequestError when there is no template or it refuses the conversation."""
        import minijinja

        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise RequestError("this model has no chat template; send plain prompts (`cake run --raw`, /v1/completions)")
        values: dict[str, Any] = {
            **self._tokens,
            **(options or {}),
            "messages": [_plain_message(index, message) for index, message in enumerate(messages)],
            "tools": _plain(tools, "tools") or None,
            "add_generation_prompt": add_generation_prompt,
        }
        # A template asks `if tools is defined`: what is None must not be there at all.
        context = {key: value for key, value in values.items() if value is not None}
        try:
            return self._environment.render_template(name, **context)
        except minijinja.TemplateError as error:
            raise RequestError(
                f"the model's chat template cannot render this conversation: {_reason(error)}", "messages"
            ) from error

    @cached_property
    def _environment(self) -> minijinja.Environment:
        import minijinja

        environment = minijinja.Environment(
            templates={name: without_generation_tags(text) for name, text in self.templates.items()},
            trim_blocks=True,
            lstrip_blocks=True,
            pycompat=True,
            fuel=FUEL,
            auto_escape_callback=lambda _: False,
        )
        environment.add_filter("tojson", _to_json)
        environment.add_global("raise_exception", _refuse)
        environment.add_global("strftime_now", lambda form: self._clock().strftime(form))
        return environment


def without_generation_tags(template: str) -> str:
    """`{% generation %}` marks answers for training and prints nothing; an always-true `if` keeps the space around it."""
    return _GENERATION.sub(lambda tag: f"{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}", template)


def _refuse(message: object = "") -> None:
    raise RequestError(f"the model's chat template refuses this conversation: {message}", "messages")


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """As transformers has it: no HTML escapes, text as it is."""
    known = {name: options[name] for name in ("separators", "sort_keys") if options.get(name) is not None}
    return json.dumps(value, ensure_ascii=bool(options.get("ensure_ascii")), indent=indent, **known)


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0].removesuffix(" (in default:1)")


def _plain_message(index: int, message: Message) -> dict[str, Any]:
    """A message as plain data; text parts are joined, since most templates know text only."""
    where = f"messages[{index}]"
    plain = _plain(message, where)
    if not isinstance(plain, dict):
        raise RequestError(f"{where} must be an object with role and content", where)
    content = plain.get("content")
    if isinstance(content, list):
        plain["content"] = "".join(_part_text(part, f"{where}.content[{number}]") for number, part in enumerate(content))
    return plain


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise RequestError(f"{where} is of type {kind!r}; this model reads text only", where)


def _plain(value: Any, where: str) -> Any:
    """Copies into dict, list, str, numbers and None: a template can reach the methods of any other object it is given."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        return [_plain(item, where) for item in value]
    raise RequestError(f"{where} holds a {type(value).__name__}, which is no JSON value", where)
