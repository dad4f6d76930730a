"""POST /v1/completions."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType

from cake_server.schemas.common import SamplingFields, Timings, UsageBody


class CompletionRequest(SamplingFields, kw_only=True):
    """`prompt`: a text, a list of texts, a list of token ids, or a list of such lists."""

    prompt: str | list[str | int | list[int]] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None


class CompletionLogprobs(Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(Struct, kw_only=True):
    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageBody | UnsetType | None = UNSET
    timings: Timings | UnsetType = UNSET
