"""What several endpoints share."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType


class ErrorDetail(Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Struct):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaSpec(Struct):
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(Struct):
    """`text`, `json_object` (with an optional `schema`, as llama.cpp has it) or `json_schema`."""

    type: str
    json_schema: JsonSchemaSpec | None = None
    schema: dict[str, Any] | None = None


class PromptDetails(Struct):
    cached_tokens: int = 0


class CompletionDetails(Struct):
    reasoning_tokens: int = 0


class UsageBody(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class Timings(Struct):
    """llama.cpp's names: tokens and milliseconds of prompt and answer, and tokens of the prompt that were cached."""

    prompt_n: int
    prompt_ms: float
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float
    cache_n: int


class SamplingFields(Struct, kw_only=True):
    """How a text is to be generated: what chat and text completions have in common."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repetition_penalty: float | None = None
    repeat_last_n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None
    structured_outputs: dict[str, Any] | None = None
    # Known, not honoured: see text.params.UNSUPPORTED.
    best_of: int | None = None
    use_beam_search: bool | None = None
    suffix: str | None = None
    typical_p: float | None = None
    mirostat: int | None = None
    dry_multiplier: float | None = None
    xtc_probability: float | None = None
    bad_words: list[str] | None = None
    logits_processors: list[Any] | None = None
    allowed_token_ids: list[int] | None = None
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: int | None = None
    tfs_z: float | None = None
    top_a: float | None = None
    samplers: Any = None
    t_max_predict_ms: float | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class TokenLogprobBody(Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(TokenLogprobBody):
    top_logprobs: list[TokenLogprobBody] = msgspec.field(default_factory=list)


class ChoiceLogprobs(Struct):
    content: list[TokenLogprobs] | None
    refusal: None = None


OptionalTimings = Timings | UnsetType
OptionalIds = list[int] | UnsetType
NOT_SAID = UNSET
