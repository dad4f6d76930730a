"""The toys' tokenizer: one id a byte, six special ones, a chat template of one line."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cake_core.errors import RequestError
from cake_core.requests import Message, SamplingDefaults
from cake_core.testing.toy_checkpoint import ASSISTANT, BEGIN, BYTES, END, SPECIALS, VOCABULARY

_SPECIAL = re.compile("(" + "|".join(re.escape(name) for name in SPECIALS) + ")")
_ROLES = ("system", "user", "assistant", "tool")
_LONGEST_CHARACTER = 4


class ToyDecodeStream:
    """Bytes to text through an incremental UTF-8 decoder; a special token ends a character that was under way."""

    def __init__(self, skip_special: bool) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._skip_special = skip_special

    def step(self, token: int) -> str:
        if token < BYTES:
            return self._decoder.decode(bytes((token,)))
        text = self.flush()
        return text if self._skip_special else text + SPECIALS[token - BYTES]

    def flush(self) -> str:
        text = self._decoder.decode(b"", True)
        self._decoder.reset()
        return text


class ToyTokenizer:
    vocab_size = VOCABULARY
    stop_ids = frozenset({END})
    bos_id: int | None = BEGIN
    defaults = SamplingDefaults()
    has_chat_template = True

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        ids = [BEGIN] if add_special else []
        for part in _SPECIAL.split(text) if parse_special else (text,):
            if parse_special and part in SPECIALS:
                ids.append(BYTES + SPECIALS.index(part))
            else:
                ids.extend(part.encode("utf-8", "replace"))
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        stream = self.stream(skip_special=skip_special)
        return "".join(map(stream.step, map(_checked, ids))) + stream.flush()

    def stream(self, prompt: Sequence[int] = (), *, skip_special: bool = True) -> ToyDecodeStream:
        stream = ToyDecodeStream(skip_special)
        # A prompt may end inside a character, which the answer then completes.
        for token in prompt[-_LONGEST_CHARACTER:]:
            stream.step(_checked(token))
        return stream

    def token_bytes(self, token: int) -> bytes:
        return bytes((token,)) if _checked(token) < BYTES else SPECIALS[token - BYTES].encode()

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        template_options: Mapping[str, Any] | None = None,
    ) -> str:
        """`<|begin|>`, then `<|role|>content<|end|>` a message; tools stand as JSON in a system message before them."""
        if not messages:
            raise RequestError("a conversation needs at least one message", "messages")
        parts = [SPECIALS[0]]
        if tools:
            parts.append(f"<|system|>{json.dumps(list(tools), sort_keys=True)}{SPECIALS[END - BYTES]}")
        for index, message in enumerate(messages):
            role = message.get("role")
            if role not in _ROLES:
                raise RequestError(f"role {role!r} is not one of {', '.join(_ROLES)}", f"messages[{index}].role")
            parts.append(f"<|{role}|>{_content(message, index)}{SPECIALS[END - BYTES]}")
        if add_generation_prompt:
            parts.append(SPECIALS[ASSISTANT - BYTES])
        return "".join(parts)

    def describe(self) -> Mapping[str, Any]:
        return {
            "tokenizer_class": "ToyTokenizer",
            "vocab_size": VOCABULARY,
            "bos_token": SPECIALS[BEGIN - BYTES],
            "eos_token": SPECIALS[END - BYTES],
            "additional_special_tokens": list(SPECIALS),
        }


def _checked(token: int) -> int:
    if not 0 <= token < VOCABULARY:
        raise RequestError(f"token {token} does not exist; the toy's ids end at {VOCABULARY - 1}", "prompt")
    return token


def _content(message: Message, index: int) -> str:
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
            raise RequestError("the toy model reads text parts only", f"messages[{index}].content")
        content = "".join(map(str, texts))
    if content is None and message.get("tool_calls"):
        content = json.dumps(message["tool_calls"], sort_keys=True)
    if not isinstance(content, str):
        raise RequestError(f"content must be text, not {content!r}", f"messages[{index}].content")
    return content
