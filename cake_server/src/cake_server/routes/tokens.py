"""POST /tokenize, /detokenize, /apply-template, GET /tokenizer_info: what evaluators and people who debug templates need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from litestar import get, post
from litestar.params import JSONBody

from cake_core.errors import RequestError
from cake_core.runtime import TextRuntime
from cake_server.routes.common import ERRORS, ServiceOf, answers_with
from cake_server.schemas.chat import ChatRequest
from cake_server.schemas.tokens import (
    DetokenizeAnswer,
    DetokenizeRequest,
    InputTokens,
    TemplateAnswer,
    TokenizeAnswer,
    TokenizeRequest,
)
from cake_server.text.answers import clean
from cake_server.text.logprobs import token_text
from cake_server.text.params import check_ids
from cake_server.text.prompt import chat_prompt, encode
from cake_server.tools.choice import tool_use


@post(["/tokenize", "/v1/tokenize"], status_code=200, responses=answers_with(TokenizeAnswer))
async def tokenize(data: JSONBody[TokenizeRequest], service: ServiceOf) -> TokenizeAnswer:
    """Text, or a conversation, to token ids."""
    runtime = service.text(data.model)
    ids = await _ids(data, runtime)
    answer = TokenizeAnswer(count=len(ids), max_model_len=runtime.info.context_length, tokens=list(ids))
    if data.with_pieces:
        answer.tokens = [{"id": token, "piece": token_text(runtime.tokenizer, token)} for token in ids]
    if data.return_token_strs:
        answer.token_strs = [token_text(runtime.tokenizer, token) for token in ids]
    return answer


async def _ids(data: TokenizeRequest, runtime: TextRuntime) -> tuple[int, ...]:
    if sum(field is not None for field in (data.prompt, data.content, data.messages)) != 1:
        raise RequestError("give one of prompt, content and messages", "prompt")
    if data.messages is not None:
        body = ChatRequest(messages=data.messages, tools=data.tools, add_generation_prompt=data.add_generation_prompt)
        return (await chat_prompt(body, runtime.tokenizer, data.tools or ())).ids
    if data.content is not None:
        return await encode(runtime.tokenizer, data.content, bool(data.add_special))
    return await encode(runtime.tokenizer, data.prompt or "", data.add_special_tokens is not False)


@post(["/detokenize", "/v1/detokenize"], status_code=200, responses=answers_with(DetokenizeAnswer))
async def detokenize(data: JSONBody[DetokenizeRequest], service: ServiceOf) -> DetokenizeAnswer:
    """Token ids to text, special tokens included."""
    runtime = service.text(data.model)
    ids = check_ids(data.tokens, runtime.info.vocab_size, "tokens")
    text = clean(runtime.tokenizer.decode(ids, skip_special=False))
    return DetokenizeAnswer(text, text)


@post("/apply-template", status_code=200, responses=answers_with(TemplateAnswer))
async def apply_template(data: JSONBody[ChatRequest], service: ServiceOf) -> TemplateAnswer:
    """The prompt that a conversation becomes, as text."""
    runtime = service.text(data.model)
    prompt = await chat_prompt(data, runtime.tokenizer, tool_use(data, runtime.tokenizer).tools)
    return TemplateAnswer(clean(prompt.text))


@post("/v1/chat/completions/input_tokens", status_code=200, responses=answers_with(InputTokens))
async def input_tokens(data: JSONBody[ChatRequest], service: ServiceOf) -> InputTokens:
    """How many tokens a conversation has, before it is sent."""
    runtime = service.text(data.model)
    prompt = await chat_prompt(data, runtime.tokenizer, tool_use(data, runtime.tokenizer).tools)
    return InputTokens(input_tokens=len(prompt.ids))


@get("/tokenizer_info", responses=ERRORS)
async def tokenizer_info(service: ServiceOf) -> dict[str, Any]:
    """tokenizer_config.json, as remote tokenizers of evaluators read it: special tokens as text."""
    tokenizer = service.text().tokenizer
    info = {key: _plain(value) for key, value in tokenizer.describe().items()}
    if "eos_token" not in info and tokenizer.stop_ids:
        info["eos_token"] = token_text(tokenizer, min(tokenizer.stop_ids))
    return info


def _plain(value: Any) -> Any:
    """A special token may be written as an object around its text."""
    return value["content"] if isinstance(value, Mapping) and isinstance(value.get("content"), str) else value
