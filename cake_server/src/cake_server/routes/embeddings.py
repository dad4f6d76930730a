"""POST /v1/embeddings: the model's final hidden state, pooled and normalised."""

from __future__ import annotations

import asyncio
import base64
import math
from array import array
from collections.abc import Sequence
from typing import Any, cast

from litestar import Response, post
from litestar.params import JSONBody

from cake_core.errors import Cancelled, RequestError
from cake_core.events import Embedding, Failed, Finished, PromptDone
from cake_core.requests import TextRequest
from cake_core.runtime import TextRuntime
from cake_server.bridge import Job
from cake_server.routes.common import AnyRequest, Exchange, ServiceOf, answers_with, new_id
from cake_server.schemas.embeddings import EmbeddingItem, EmbeddingList, EmbeddingRequest, EmbeddingUsage
from cake_server.text.params import check_context, check_ids
from cake_server.text.prompt import encode

MAX_INPUTS = 2048
_FORMATS = (None, "float", "base64")
_POOLINGS = (None, "last", "mean")


@post(["/v1/embeddings", "/embeddings"], status_code=200, responses=answers_with(EmbeddingList))
async def embeddings(data: JSONBody[EmbeddingRequest], request: AnyRequest, service: ServiceOf) -> Response[Any]:
    """Vectors of unit length, one for each input."""
    runtime = service.text(data.model)
    if data.encoding_format not in _FORMATS:
        raise RequestError(f"encoding_format is float or base64, not {data.encoding_format!r}", "encoding_format")
    if data.pooling not in _POOLINGS:
        raise RequestError(f"pooling is last or mean, not {data.pooling!r}", "pooling")
    if data.dimensions is not None and data.dimensions < 1:
        raise RequestError("dimensions must be at least 1", "dimensions")
    inputs = await _inputs(data, runtime)
    requests = [TextRequest(prompt=ids, max_tokens=0, embed=True) for ids in inputs]
    exchange = Exchange.start(request, service, new_id("embd"), runtime.engine, requests)
    counted = sum(map(len, inputs))
    exchange = exchange.telling(lambda: {"prompt_tokens": counted, "inputs": len(inputs)})
    return await exchange.whole(_collect(data, exchange.job, len(inputs), data.model or service.model))


async def _inputs(data: EmbeddingRequest, runtime: TextRuntime) -> list[tuple[int, ...]]:
    given = data.input
    if isinstance(given, list) and given and all(isinstance(item, int) for item in given):
        given = cast("list[str | int | list[int]]", [given])
    items = [given] if isinstance(given, str) else given
    if not 1 <= len(items) <= MAX_INPUTS:
        raise RequestError(f"input takes 1 to {MAX_INPUTS} items, not {len(items)}", "input")
    result = []
    for item in items:
        if isinstance(item, int):
            raise RequestError("input mixes token ids with other things; use one form", "input")
        ids = (
            await encode(runtime.tokenizer, item)
            if isinstance(item, str)
            else check_ids(item, runtime.info.vocab_size, "input")
        )
        if not ids:
            raise RequestError("an input must not be empty", "input")
        check_context(len(ids), runtime.info.context_length, "input")
        result.append(ids)
    return result


async def _collect(data: EmbeddingRequest, job: Job[Any, Any], count: int, model: str) -> EmbeddingList:
    vectors: list[array[float]] = [array("f")] * count
    tokens = 0
    while job.more:
        for index, event, _ in await job.get():
            if isinstance(event, Embedding):
                vectors[index] = await asyncio.to_thread(pooled, event, data.pooling == "mean")
            elif isinstance(event, Failed):
                raise event.error
            elif isinstance(event, Finished) and event.reason == "cancelled":
                raise Cancelled("the request was cancelled")
            elif isinstance(event, PromptDone | Finished):
                tokens += event.usage.prompt_tokens if isinstance(event, Finished) else 0
    items = [
        EmbeddingItem(index=index, embedding=_encoded(_shortened(vector, data.dimensions), data.encoding_format == "base64"))
        for index, vector in enumerate(vectors)
    ]
    return EmbeddingList(data=items, model=model, usage=EmbeddingUsage(tokens, tokens))


def pooled(event: Embedding, mean: bool) -> array[float]:
    """The last position's state, or the mean of all."""
    states = array("f", event.data)
    if not mean:
        return states[-event.width :]
    positions = len(states) // event.width
    return array("f", (math.fsum(states[column :: event.width]) / positions for column in range(event.width)))


def _shortened(vector: array[float], dimensions: int | None) -> array[float]:
    """Of unit length, after the cut: models trained for it (Matryoshka) keep their meaning in the first dimensions."""
    if dimensions is not None and dimensions > len(vector):
        raise RequestError(f"dimensions: this model's vectors have {len(vector)}", "dimensions")
    cut = vector[:dimensions]
    length = math.sqrt(math.fsum(value * value for value in cut))
    return array("f", (value / length for value in cut)) if length else cut


def _encoded(vector: Sequence[float], as_base64: bool) -> list[float] | str:
    return base64.b64encode(array("f", vector).tobytes()).decode() if as_base64 else list(vector)
