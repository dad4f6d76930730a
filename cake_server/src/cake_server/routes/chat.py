"""POST /v1/chat/completions, and the seed's /api/v1/chat/completions: the same."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from litestar import Response, post
from litestar.params import JSONBody

from cake_core.errors import RequestError
from cake_core.runtime import TextRuntime
from cake_server.routes.common import AnyRequest, Exchange, ServiceOf, answers_with, new_id
from cake_server.schemas.chat import ChatCompletion, ChatRequest
from cake_server.schemas.common import SamplingFields
from cake_server.service import Service
from cake_server.text.answers import Answers
from cake_server.text.chat import ChatMeta, ChatStream, collect_chat
from cake_server.text.grammar import answer_grammar
from cake_server.text.params import Plan, choices, text_requests
from cake_server.text.prompt import Prompt, chat_prompt
from cake_server.text.reasoning import answer_parser
from cake_server.tools.choice import ToolUse, chat_template, tool_use

CHAT_PATHS = ["/v1/chat/completions", "/api/v1/chat/completions", "/chat/completions"]


@post(CHAT_PATHS, status_code=200, responses=answers_with(ChatCompletion, "The answer; an event stream with `stream`."))
async def chat_completions(data: JSONBody[ChatRequest], request: AnyRequest, service: ServiceOf) -> Response[Any]:
    """Answers a conversation, whole or as a stream of server-sent events (`stream`)."""
    runtime = service.text(data.model)
    use = tool_use(data, runtime.tokenizer)
    prompt = await chat_prompt(data, runtime.tokenizer, use.tools)
    requests = text_requests(data, [prompt.ids], runtime, service.settings, _plan(data, use))
    meta = _meta(data, service, runtime, prompt)
    exchange = Exchange.start(request, service, meta.id, runtime.engine, requests)
    answers = make_answers(exchange, data, runtime, use, prompt)
    exchange = exchange.telling(lambda: log_facts(answers))
    if data.stream:
        return await exchange.stream(ChatStream(meta, answers).frames())
    return await exchange.whole(collect_chat(meta, answers))


def _plan(data: ChatRequest, use: ToolUse) -> Plan:
    grammar = answer_grammar(data)
    if grammar is not None and use.grammar is not None:
        raise RequestError("tool_choice forces a call, so the answer cannot have another format", "tool_choice")
    if data.top_logprobs is not None and not data.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
    if data.top_logprobs is not None and not 0 <= data.top_logprobs <= 20:
        raise RequestError(f"top_logprobs must be between 0 and 20, not {data.top_logprobs}", "top_logprobs")
    return Plan(
        max_tokens=data.max_completion_tokens if data.max_completion_tokens is not None else data.max_tokens,
        logprobs=(data.top_logprobs or 0) if data.logprobs else None,
        grammar=use.grammar or grammar,
        show_special=use.show_special,
    )


def _meta(data: ChatRequest, service: Service, runtime: TextRuntime, prompt: Prompt) -> ChatMeta:
    usage, continuous = usage_options(data)
    return ChatMeta(
        id=new_id("chatcmpl"),
        created=int(time.time()),
        model=data.model or service.model,
        fingerprint=service.fingerprint,
        choices=choices(data),
        tokenizer=runtime.tokenizer,
        logprobs=bool(data.logprobs),
        token_ids=bool(data.return_token_ids),
        usage=usage,
        continuous_usage=continuous,
        prompt_ids=prompt.ids,
    )


def make_answers(exchange: Exchange, data: ChatRequest, runtime: TextRuntime, use: ToolUse, prompt: Prompt) -> Answers:
    count, template = choices(data), chat_template(runtime.tokenizer)
    parsers = [answer_parser(use.parser(), template, prompt.text) for _ in range(count)]
    answers = Answers(exchange.job, parsers, count, exchange.service.metrics)
    if use.show_special:
        answers.hidden = runtime.tokenizer.stop_ids
    return answers


def usage_options(data: SamplingFields) -> tuple[bool, bool]:
    options = data.stream_options
    return (bool(options.include_usage), bool(options.continuous_usage_stats)) if options else (False, False)


def log_facts(answers: Answers) -> Mapping[str, Any]:
    usage = answers.usage()
    facts: dict[str, Any] = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
    if answers.first_token is not None:
        facts["first_token"] = round(answers.first_token, 4)
    return facts
