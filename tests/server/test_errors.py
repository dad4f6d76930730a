"""Every way a request can be wrong ends in an OpenAI error body with the right status and the field's name."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest

from cake_core import errors
from cake_core.events import Failed, Finished, PromptDone, TokenEvent, Usage
from cake_server.errors import error_body, to_api_error

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


def failure(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    assert response.headers["x-request-id"]
    error: dict[str, Any] = response.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert "Traceback" not in response.text
    return error


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 99}, "n"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"seed": 2**70}, "seed"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"min_tokens": 4}, "min_tokens"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"continue_final_message": True}, "continue_final_message"),
    ],
)
def test_a_bad_field_is_named(api: httpx.Client, change: dict[str, Any], param: str) -> None:
    error = failure(api.post(CHAT, json={**HELLO, **change}), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


@pytest.mark.parametrize(
    "change",
    [
        {"audio": {"voice": "x"}},
        {"modalities": ["text", "audio"]},
        {"functions": [{"name": "f"}]},
        {"best_of": 4},
        {"use_beam_search": True},
        {"mirostat": 2},
        {"suffix": "x"},
        {"allowed_token_ids": [5]},
        {"guided_json": {}},
        {"truncate_prompt_tokens": 3},
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(api: httpx.Client, change: dict[str, Any]) -> None:
    error = failure(api.post(CHAT, json={**HELLO, **change}), 400)
    assert error["code"] == "unsupported_parameter"
    assert error["param"] == next(iter(change))


@pytest.mark.parametrize("change", [{"modalities": ["text"]}, {"best_of": 1}, {"user": "me"}, {"store": False}, {"xyz": [1]}])
def test_what_changes_nothing_is_accepted(api: httpx.Client, change: dict[str, Any]) -> None:
    assert api.post(CHAT, json={**HELLO, **change}).status_code == 200


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"messages": "x"}', b"[" * 100_000, b'{"messages":' * 20_000, b"\x00"],
)
def test_garbage_is_a_bad_request(api: httpx.Client, content: bytes) -> None:
    failure(api.post(CHAT, content=content, headers={"content-type": "application/json"}), 400)


def test_deeply_nested_json_in_a_free_field_is_no_500(api: httpx.Client) -> None:
    bomb = (
        b'{"messages":[{"role":"user","content":"x"}],"max_tokens":1,"chat_template_kwargs":'
        + b'{"a":' * 3000
        + b"1"
        + b"}" * 3001
    )
    assert api.post(CHAT, content=bomb).status_code in (200, 400)


def test_no_body_and_no_object_are_said_in_words(api: httpx.Client) -> None:
    empty = failure(api.post(CHAT), 400)
    assert (empty["message"], empty["param"]) == ("the body is empty; send a JSON object", None)
    assert "object" in failure(api.post(CHAT, json=[1]), 400)["message"]


def test_a_head_is_a_get_without_its_body(api: httpx.Client) -> None:
    for path in ("/health", "/v1/models", "/", "/metrics"):
        head = api.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == api.get(path).headers["content-type"]
        assert head.headers["content-type"].count("charset") <= 1
    assert api.head("/v1/nothing").status_code == 404
    assert api.head(CHAT).status_code == 405


def test_what_is_not_http_gets_the_same_kind_of_error(server: Any) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost localhost\r\n\r\n")
        head, _, body = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"x-request-id: req_" in head
    assert json.loads(body)["error"]["code"] == "invalid_http"


def test_unknown_paths_and_methods(api: httpx.Client) -> None:
    assert failure(api.get("/v1/nothing"), 404)["code"] == "not_found"
    assert failure(api.get("/schema/nothing"), 404)["code"] == "not_found"
    assert failure(api.get("/ui/nothing.js"), 404)["code"] == "not_found"
    assert failure(api.get("/ui/..%2f..%2f__init__.py"), 404)
    assert failure(api.get(CHAT), 405)["code"] == "method_not_allowed"


def test_a_long_prompt_carries_its_numbers(api: httpx.Client) -> None:
    error = failure(api.post(CHAT, json={"messages": [{"role": "user", "content": "x" * 5000}]}), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["n_ctx"] == 4096
    assert error["n_prompt_tokens"] > 5000
    assert error["message"].startswith("This model's maximum context length is 4096 tokens. However,")


def test_bodies_over_the_limit(start: Any, runtime: Any) -> None:
    server = start(runtime, max_body=1000)
    with httpx.Client(base_url=server.url) as client:
        failure(client.post(CHAT, content=b"x" * 1001), 413)
        chunks = (b"x" * 600 for _ in range(3))
        failure(client.post(CHAT, content=chunks), 413)
        assert client.get("/health").status_code == 200


def test_headers_over_the_limit(api: httpx.Client) -> None:
    response = api.get("/health", headers={"x-long": "x" * 40_000})
    assert response.status_code == 431
    assert response.json()["error"]["code"] == "headers_too_large"


def test_an_error_before_the_first_token_keeps_its_status(start: Any, scripted: Any) -> None:
    runtime, _ = scripted(script=[Failed(errors.NodeLost("worker attic is gone; restart it", "attic"))])
    server = start(runtime)
    with httpx.Client(base_url=server.url) as client:
        for stream in (False, True):
            error = failure(client.post(CHAT, json={**HELLO, "stream": stream}), 503)
            assert error["code"] == "cluster_degraded"
            assert "attic" in error["message"]


def test_an_error_inside_a_stream_is_an_event(start: Any, scripted: Any) -> None:
    script = [PromptDone(Usage(1)), TokenEvent(65, "A"), Failed(errors.StageError("the stage failed"))]
    runtime, _ = scripted(script=script)
    server = start(runtime, first_event_wait=0.0)
    with httpx.Client(base_url=server.url) as client:
        response = client.post(CHAT, json={**HELLO, "stream": True})
    if response.status_code == 200:  # unless all three came before the status line went out
        assert response.text.endswith("data: [DONE]\n\n")
        assert '"error":{"message":"the stage failed","type":"server_error","param":null,"code":"stage_error"}' in response.text
    else:
        failure(response, 500)


def test_a_cancelled_engine_is_an_error_not_an_answer(start: Any, scripted: Any) -> None:
    runtime, _ = scripted(script=[Finished("cancelled", "", Usage(1))])
    server = start(runtime)
    with httpx.Client(base_url=server.url) as client:
        assert client.post(CHAT, json=HELLO).json()["error"]["code"] == "cancelled"


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (errors.RequestError("x", "p"), 400, "invalid_request_error", None),
        (errors.ContextLengthError("x"), 400, "invalid_request_error", "context_length_exceeded"),
        (errors.QueueFullError("x"), 429, "rate_limit_error", "queue_full"),
        (errors.CapacityError("x"), 503, "unavailable_error", "insufficient_capacity"),
        (errors.NodeUnreachable("x"), 503, "unavailable_error", "cluster_degraded"),
        (errors.DeadlineExceeded("x"), 503, "unavailable_error", "deadline_exceeded"),
        (errors.StageError("x"), 500, "server_error", "stage_error"),
        (errors.Cancelled("x"), 499, "invalid_request_error", "cancelled"),
        (RuntimeError("a secret"), 500, "server_error", "internal_error"),
        (RecursionError(), 400, "invalid_request_error", "nesting_too_deep"),
    ],
)
def test_the_mapping(error: Exception, status: int, kind: str, code: str | None) -> None:
    mapped = to_api_error(error)
    detail = error_body(mapped)["error"]
    assert (mapped.status, detail["type"], detail["code"]) == (status, kind, code)
    assert "secret" not in detail["message"]
    assert status not in (429, 503) or "retry-after" in mapped.headers
