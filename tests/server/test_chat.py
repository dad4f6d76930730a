"""Chat completions over HTTP: whole, streamed byte for byte, several choices, and the seed's path."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from cake_core.requests import SamplingParams, TextRequest
from cake_core.runtime import TextRuntime

HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "seed": 7}


def expected(runtime: TextRuntime, seed: int = 7, choice: int = 0, max_tokens: int = 12) -> str:
    """What the engine says without a server around it."""
    tokenizer = runtime.tokenizer
    prompt = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": "hi"}]), add_special=False)
    request = TextRequest(
        tuple(prompt), SamplingParams(seed=seed), max_tokens=max_tokens, stop_ids=tokenizer.stop_ids, choice=choice
    )
    return "".join(getattr(event, "text", "") for event in runtime.engine.generate(request))


def events(response: httpx.Response) -> list[Any]:
    lines = [line for line in response.text.splitlines() if line]
    assert all(line.startswith(("data: ", ":")) for line in lines)
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/v1/chat/completions"])
def test_an_answer_is_what_the_engine_says(api: httpx.Client, runtime: TextRuntime, path: str) -> None:
    body = api.post(path, json=HELLO).raise_for_status().json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "toy"
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", body["id"])
    message = body["choices"][0]["message"]
    assert message == {"role": "assistant", "content": expected(runtime), "refusal": None}
    assert body["usage"]["completion_tokens"] == 12
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 12
    assert body["timings"]["predicted_n"] == 12


def test_the_seeds_own_curl_works(api: httpx.Client) -> None:
    """No model, no sampling fields, roles as its clients wrote them."""
    messages = [{"role": "System", "content": "You are helpful."}, {"role": "User", "content": "Why is the sky blue?"}]
    body = api.post("/api/v1/chat/completions", json={"messages": messages, "max_tokens": 4}).raise_for_status().json()
    assert body["choices"][0]["finish_reason"] in ("stop", "length")


def test_a_stream_is_a_golden_transcript(api: httpx.Client, runtime: TextRuntime) -> None:
    request = {**HELLO, "max_tokens": 2, "stream": True, "logprobs": True}
    response = api.post("/v1/chat/completions", json=request)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    text = re.sub(r'"chatcmpl-[0-9a-f]+"', '"ID"', response.text)
    text = re.sub(r'"created":\d+', '"created":0', text)
    text = re.sub(r'"fp_[0-9a-f]+"', '"FP"', text)
    text = re.sub(r'"timings":\{[^}]*\}', '"timings":{}', text)
    text = re.sub(r"-?\d+\.\d+", "0.5", text)
    first, second = expected(runtime, max_tokens=2)

    def chunk(delta: str, logprobs: str = "null", end: str = '"finish_reason":null}]}') -> str:
        head = '{"id":"ID","object":"chat.completion.chunk","created":0,"model":"toy","system_fingerprint":"FP","choices":'
        return f'data: {head}[{{"index":0,"delta":{delta},"logprobs":{logprobs},{end}\n\n'

    def token(letter: str) -> str:
        item = f'{{"token":"{letter}","logprob":0.5,"bytes":[{ord(letter)}],"top_logprobs":[]}}'
        return chunk(f'{{"content":"{letter}"}}', f'{{"content":[{item}],"refusal":null}}')

    golden = [
        chunk('{"role":"assistant","content":""}'),
        token(first),
        token(second),
        chunk("{}", end='"finish_reason":"length"}],"timings":{}}'),
        "data: [DONE]\n\n",
    ]
    merged = events(response)
    assert "".join(choice["delta"].get("content", "") for event in merged for choice in event["choices"]) == first + second
    if len(merged) == 4:  # two tokens of one wake-up share a chunk: allowed, and then not the golden case
        assert text == "".join(golden)


def test_a_stream_adds_up_to_the_whole_answer(api: httpx.Client, runtime: TextRuntime) -> None:
    request = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(api.post("/v1/chat/completions", json=request))
    assert len({chunk["id"] for chunk in chunks}) == len({chunk["created"] for chunk in chunks}) == 1
    assert "".join(c["delta"].get("content", "") for chunk in chunks for c in chunk["choices"]) == expected(runtime)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_without_include_usage_no_chunk_has_any(api: httpx.Client) -> None:
    chunks = events(api.post("/v1/chat/completions", json={**HELLO, "stream": True}))
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)
    assert chunks[-1]["timings"]["predicted_n"] == 12


def test_continuous_usage_counts_up(api: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(api.post("/v1/chat/completions", json={**HELLO, "stream": True, "stream_options": options}))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 12


@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_the_engines_choices(api: httpx.Client, runtime: TextRuntime, stream: bool) -> None:
    response = api.post("/v1/chat/completions", json={**HELLO, "n": 3, "stream": stream})
    wanted = [expected(runtime, choice=index) for index in range(3)]
    if stream:
        found = ["", "", ""]
        for chunk in events(response):
            for choice in chunk["choices"]:
                found[choice["index"]] += choice["delta"].get("content", "")
    else:
        body = response.json()
        found = [choice["message"]["content"] for choice in body["choices"]]
        assert body["usage"]["completion_tokens"] == sum(map(len, wanted)) + sum(
            choice["finish_reason"] == "stop" for choice in body["choices"]
        )
        assert body["usage"]["prompt_tokens"] == 6, "a prompt counts once, however many answers it has"
    assert found == wanted


def test_a_stop_string_ends_and_does_not_show(api: httpx.Client, runtime: TextRuntime) -> None:
    text = expected(runtime)
    stop = text[4:6]
    body = api.post("/v1/chat/completions", json={**HELLO, "stop": [stop]}).json()
    choice = body["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == text[: text.index(stop)]
    kept = api.post("/v1/chat/completions", json={**HELLO, "stop": stop, "include_stop_str_in_output": True}).json()
    assert kept["choices"][0]["message"]["content"] == text[: text.index(stop)] + stop


def test_top_logprobs_hold_the_token_itself_when_greedy(api: httpx.Client) -> None:
    request = {**HELLO, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    content = api.post("/v1/chat/completions", json=request).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 12
    for entry in content:
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0] == {key: entry[key] for key in ("token", "logprob", "bytes")}


def test_token_ids_come_when_asked_for(api: httpx.Client, runtime: TextRuntime) -> None:
    body = api.post("/v1/chat/completions", json={**HELLO, "return_token_ids": True}).json()
    assert runtime.tokenizer.decode(body["choices"][0]["token_ids"]) == expected(runtime)
    assert len(body["prompt_token_ids"]) == body["usage"]["prompt_tokens"]


def test_content_parts_and_null_mean_what_they_say(api: httpx.Client) -> None:
    parts = [{"type": "text", "text": "hi"}]
    plain = api.post("/v1/chat/completions", json=HELLO).json()
    body = {**HELLO, "messages": [{"role": "user", "content": parts}], "temperature": None, "unknown_field": {"x": 1}}
    assert api.post("/v1/chat/completions", json=body).json()["choices"] == plain["choices"]


def test_the_same_seed_gives_the_same_text_and_another_does_not(api: httpx.Client) -> None:
    texts = [
        api.post("/v1/chat/completions", json={**HELLO, "seed": seed}).json()["choices"][0]["message"]["content"]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
