"""OpenAI's own Python SDK: chat, streams, tools, schemas, embeddings, images, errors, cancelling."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from cake_core.runtime import ImageRuntime, TextRuntime

pytestmark = pytest.mark.full
openai = pytest.importorskip("openai", reason="needs openai")

HELLO: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client_of() -> Iterator[Callable[..., Any]]:
    clients: list[Any] = []

    def make(server: Any, key: str = "none") -> Any:
        clients.append(openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(server: Any, client_of: Any) -> Any:
    return client_of(server)


def test_chat_and_its_stream_agree(client: Any) -> None:
    whole = client.chat.completions.create(model="toy", messages=HELLO, seed=7, max_tokens=12)
    options: Any = {"include_usage": True}
    stream = client.chat.completions.create(
        model="toy", messages=HELLO, seed=7, max_tokens=12, stream=True, stream_options=options
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole._request_id.startswith("req_")


def test_the_streaming_helper(client: Any) -> None:
    with client.chat.completions.stream(model="toy", messages=HELLO, seed=7, stop=["e", " ", ","]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds
    assert final.choices[0].finish_reason == "stop"


def test_logprobs_models_completions(client: Any) -> None:
    answer = client.chat.completions.create(
        model="toy", messages=HELLO, logprobs=True, top_logprobs=2, max_tokens=3, temperature=0
    )
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").id == "toy"
    done = client.completions.create(model="toy", prompt="hi", echo=True, logprobs=1, max_tokens=2)
    assert done.choices[0].logprobs.token_logprobs[0] is None


def test_embeddings_come_packed(client: Any) -> None:
    vectors = client.embeddings.create(model="toy", input=["one", "two"]).data
    assert all(isinstance(value, float) for value in vectors[0].embedding)
    plain = client.embeddings.create(model="toy", input="two", encoding_format="float").data[0].embedding
    assert vectors[1].embedding == pytest.approx(plain, abs=1e-6)


def test_errors_are_its_own_classes(client: Any, client_of: Any, start: Any, runtime: TextRuntime) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="toy", messages=HELLO, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=HELLO)
    assert missing.value.code == "model_not_found"
    locked = client_of(start(runtime, api_keys=("k",)), "wrong")
    with pytest.raises(openai.AuthenticationError):
        locked.models.list()
    with pytest.raises(openai.InternalServerError) as loading:
        client_of(start()).models.list()
    assert loading.value.status_code == 503
    assert loading.value.code == "model_loading"


def test_an_error_inside_a_stream(client_of: Any, start: Any, slow_runtime: TextRuntime) -> None:
    server = start(slow_runtime)
    stream = client_of(server).chat.completions.create(model="", messages=HELLO, stream=True, extra_body={"ignore_eos": True})
    chunks = iter(stream)
    httpx.post(f"{server.url}/v1/cancel/{next(chunks).id}").raise_for_status()
    with pytest.raises(openai.APIError, match="cancelled"):
        list(chunks)


def test_closing_a_stream_cancels(client_of: Any, start: Any, slow_runtime: TextRuntime) -> None:
    server = start(slow_runtime)
    stream = client_of(server).chat.completions.create(model="", messages=HELLO, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    for _ in range(500):
        if not server.service.jobs:
            break
        time.sleep(0.01)
    assert not server.service.jobs


def test_tools_and_schemas(client_of: Any, start: Any, scripted: Any) -> None:
    runtime, _ = scripted('<tool_call>{"name": "weather", "arguments": {"city": "Bonn"}}</tool_call>', template="<tool_call>")
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    client = client_of(start(runtime))
    answer = client.chat.completions.create(model="", messages=HELLO, tools=tools)
    assert answer.choices[0].message.tool_calls[0].function.arguments == '{"city": "Bonn"}'
    with client.chat.completions.stream(model="toy", messages=HELLO, tools=tools) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.name == "weather"


def test_images(client_of: Any, start: Any, image_runtime: ImageRuntime) -> None:
    client = client_of(start(image_runtime))
    answer = client.images.generate(model="toy-image", prompt="x", n=2, size="64x64")  # type: ignore[call-overload, unused-ignore]
    assert len(answer.data) == 2
    events = list(client.images.generate(model="toy-image", prompt="x", stream=True, partial_images=2, extra_body={"steps": 8}))
    assert events[-1].type == "image_generation.completed"
    assert {event.type for event in events[:-1]} == {"image_generation.partial_image"}
