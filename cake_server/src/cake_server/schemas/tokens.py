"""Tokenising, in llama.cpp's shape and in vLLM's: the answers carry both."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType

from cake_server.schemas.chat import MessageIn, Tool


class TokenizeRequest(Struct, kw_only=True):
    """`prompt` (vLLM) or `content` (llama.cpp), which differ in whether special tokens are added; or `messages`."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: list[MessageIn] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    with_pieces: bool | None = None


class TokenizeAnswer(Struct, kw_only=True):
    """`tokens` are ids, or with `with_pieces` objects of id and piece."""

    count: int
    max_model_len: int
    tokens: list[Any]
    token_strs: list[str] | UnsetType = UNSET


class DetokenizeRequest(Struct, kw_only=True):
    tokens: list[int]
    model: str | None = None


class DetokenizeAnswer(Struct):
    prompt: str
    content: str


class TemplateAnswer(Struct):
    prompt: str


class InputTokens(Struct, kw_only=True):
    object: str = "response.input_tokens"
    input_tokens: int
