"""POST /v1/completions: text in, text out; with `echo` and `logprobs` what evaluators score with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

from litestar import Response, post
from litestar.params import JSONBody

from cake_core.errors import RequestError
from cake_core.runtime import TextRuntime
from cake_server.routes.chat import log_facts, usage_options
from cake_server.routes.common import AnyRequest, Exchange, ServiceOf, answers_with, new_id
from cake_server.schemas.completions import Completion, CompletionRequest
from cake_server.service import Service
from cake_server.text.answers import Answers
from cake_server.text.completion import CompletionMeta, CompletionWriter
from cake_server.text.grammar import answer_grammar
from cake_server.text.params import Plan, check_ids, choices, text_requests
from cake_server.text.prompt import encode
from cake_server.tools.pieces import PlainParser

DEFAULT_TOKENS = 16
"""The specification's, and every other server's."""


@post(["/v1/completions", "/completions"], status_code=200, responses=answers_with(Completion))
async def completions(data: JSONBody[CompletionRequest], request: AnyRequest, service: ServiceOf) -> Response[Any]:
    """Continues a prompt, or each of several."""
    runtime = service.text(data.model)
    prompts = await prompt_ids(data, runtime)
    count = choices(data)
    plan = _plan(data, service)
    requests = text_requests(data, prompts, runtime, service.settings, plan)
    usage, continuous = usage_options(data)
    meta = CompletionMeta(
        id=new_id("cmpl"),
        created=int(time.time()),
        model=data.model or service.model,
        fingerprint=service.fingerprint,
        tokenizer=runtime.tokenizer,
        prompts=[prompt for prompt in prompts for _ in range(count)],
        echo=bool(data.echo),
        logprobs=plan.logprobs is not None,
        token_ids=bool(data.return_token_ids),
        usage=usage,
        continuous_usage=continuous,
    )
    exchange = Exchange.start(request, service, meta.id, runtime.engine, requests)
    answers = Answers(exchange.job, [PlainParser() for _ in requests], count, service.metrics)
    exchange = exchange.telling(lambda: log_facts(answers))
    writer = CompletionWriter(meta, answers)
    return await exchange.stream(writer.frames()) if data.stream else await exchange.whole(writer.collect())


def _plan(data: CompletionRequest, service: Service) -> Plan:
    asked = data.max_tokens if data.max_tokens is not None else data.max_completion_tokens
    default = service.settings.max_tokens if service.settings.max_tokens is not None else DEFAULT_TOKENS
    logprobs = data.logprobs
    if logprobs is not None and not 0 <= logprobs <= 20:
        raise RequestError(f"logprobs must be between 0 and 20, not {logprobs}", "logprobs")
    return Plan(
        max_tokens=default if asked is None else asked,
        logprobs=logprobs,
        grammar=answer_grammar(data),
        score_prompt=bool(data.echo) and logprobs is not None,
    )


async def prompt_ids(data: CompletionRequest, runtime: TextRuntime) -> list[tuple[int, ...]]:
    """Every prompt as ids, whichever of the four forms it came in."""
    prompt = data.prompt
    if prompt is None or prompt == []:
        raise RequestError("prompt is missing; give a text, or token ids", "prompt")
    if isinstance(prompt, str):
        return [await encode(runtime.tokenizer, prompt, data.add_special_tokens is not False)]
    if all(isinstance(item, int) for item in prompt):
        return [check_ids(cast("list[int]", prompt), runtime.info.vocab_size)]
    return [await _one(item, data, runtime) for item in prompt]


async def _one(item: str | int | Sequence[int], data: CompletionRequest, runtime: TextRuntime) -> tuple[int, ...]:
    if isinstance(item, int):
        raise RequestError("prompt mixes token ids with other things; use one form", "prompt")
    if isinstance(item, str):
        return await encode(runtime.tokenizer, item, data.add_special_tokens is not False)
    return check_ids(item, runtime.info.vocab_size)
