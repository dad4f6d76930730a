"""Tokenising in both shapes, and embeddings as the SDKs ask for them."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

import httpx
import pytest

from cake_core.events import Embedding
from cake_core.requests import TextRequest
from cake_core.runtime import TextRuntime
from cake_server.routes.embeddings import pooled


def test_vllms_shape_adds_special_tokens_and_llama_cpps_does_not(api: httpx.Client) -> None:
    assert api.post("/tokenize", json={"prompt": "hi"}).json() == {"count": 3, "max_model_len": 4096, "tokens": [256, 104, 105]}
    assert api.post("/tokenize", json={"content": "hi"}).json()["tokens"] == [104, 105]
    assert api.post("/tokenize", json={"content": "hi", "add_special": True}).json()["tokens"] == [256, 104, 105]
    assert api.post("/tokenize", json={"prompt": "hi", "add_special_tokens": False}).json()["tokens"] == [104, 105]
    pieces = api.post("/tokenize", json={"content": "é", "with_pieces": True}).json()["tokens"]
    assert pieces == [{"id": 195, "piece": "bytes:\\xc3"}, {"id": 169, "piece": "bytes:\\xa9"}]
    assert api.post("/tokenize", json={"prompt": "hi", "return_token_strs": True}).json()["token_strs"] == [
        "<|begin|>",
        "h",
        "i",
    ]


def test_a_conversation_counts_as_what_is_sent(api: httpx.Client) -> None:
    messages = [{"role": "user", "content": "hi"}]
    ids = api.post("/tokenize", json={"messages": messages}).json()["tokens"]
    prompt = api.post("/apply-template", json={"messages": messages}).json()["prompt"]
    assert api.post("/detokenize", json={"tokens": ids}).json() == {"prompt": prompt, "content": prompt}
    assert api.post("/v1/chat/completions/input_tokens", json={"messages": messages}).json()["input_tokens"] == len(ids)
    used = api.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()["usage"]["prompt_tokens"]
    assert used == len(ids)


def test_a_final_message_can_be_continued(api: httpx.Client) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    assert api.post("/apply-template", json=body).json()["prompt"].endswith("<|assistant|>Well,")


def test_the_remote_tokenizer_finds_its_special_tokens(api: httpx.Client) -> None:
    info = api.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|end|>"
    assert info["bos_token"] == "<|begin|>"


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "content": "b"}, {"messages": []}, {"prompt": 3}])
def test_wrong_tokenize_requests(api: httpx.Client, body: dict[str, Any]) -> None:
    assert api.post("/tokenize", json=body).status_code == 400


def test_wrong_ids(api: httpx.Client) -> None:
    error = api.post("/detokenize", json={"tokens": [5, 10**9]}).json()["error"]
    assert error["param"] == "tokens"


def test_embeddings_have_unit_length_and_are_the_last_state(api: httpx.Client, runtime: TextRuntime) -> None:
    ids = tuple(runtime.tokenizer.encode("hello"))
    event = next(e for e in runtime.engine.generate(TextRequest(ids, max_tokens=0, embed=True)) if isinstance(e, Embedding))
    last = struct.unpack(f"<{event.width}f", event.data[-4 * event.width :])
    length = math.sqrt(sum(value * value for value in last))
    body = api.post("/v1/embeddings", json={"input": ["hello", "other"], "model": "toy"}).raise_for_status().json()
    first, second = (item["embedding"] for item in body["data"])
    assert first == pytest.approx([value / length for value in last], abs=1e-6)
    assert math.sqrt(sum(value * value for value in second)) == pytest.approx(1, abs=1e-5)
    assert first != second
    assert body["usage"] == {"prompt_tokens": 12, "total_tokens": 12}


def test_base64_floats_ids_and_dimensions(api: httpx.Client, runtime: TextRuntime) -> None:
    plain = api.post("/v1/embeddings", json={"input": "hello"}).json()["data"][0]["embedding"]
    packed = api.post("/v1/embeddings", json={"input": "hello", "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert list(struct.unpack(f"<{len(plain)}f", base64.b64decode(packed))) == pytest.approx(plain)
    ids = runtime.tokenizer.encode("hello")
    for given in (ids, [ids]):
        assert api.post("/v1/embeddings", json={"input": given}).json()["data"][0]["embedding"] == plain
    short = api.post("/v1/embeddings", json={"input": "hello", "dimensions": 3}).json()["data"][0]["embedding"]
    assert len(short) == 3
    assert short[0] / short[1] == pytest.approx(plain[0] / plain[1], rel=1e-4)


def test_the_mean_of_positions() -> None:
    event = Embedding(2, struct.pack("<6f", 1, 2, 3, 4, 5, 9))
    assert list(pooled(event, mean=False)) == [5, 9]
    assert list(pooled(event, mean=True)) == [3, 5]


def test_many_inputs_at_once_come_back_in_order(api: httpx.Client) -> None:
    inputs = [f"text {index % 7}" for index in range(100)]
    data = api.post("/v1/embeddings", json={"input": inputs}).raise_for_status().json()["data"]
    assert [item["index"] for item in data] == list(range(100))
    assert all(data[index]["embedding"] == data[index % 7]["embedding"] for index in range(100))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [1, "x"]}, "input"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "dimensions": 9999}, "dimensions"),
        ({"input": "x", "pooling": "max"}, "pooling"),
        ({"input": "x" * 9000}, "input"),
        ({"input": ["x"] * 3000}, "input"),
    ],
)
def test_wrong_inputs_are_named(api: httpx.Client, body: dict[str, Any], param: str) -> None:
    response = api.post("/v1/embeddings", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
