"""Models, health, metrics, request ids."""

from __future__ import annotations

from typing import Any

import httpx

from cake_core.runtime import TextRuntime


def test_the_model_is_listed_with_what_clients_look_for(api: httpx.Client) -> None:
    body = api.get("/v1/models").raise_for_status().json()
    assert body["object"] == "list"
    (card,) = body["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("toy", "model", 4096)
    assert card["architecture"]["output_modalities"] == ["text"]
    assert api.get("/v1/models/toy").json() == card


def test_aliases_are_models_too_and_ids_may_have_slashes(start: Any, runtime: TextRuntime) -> None:
    server = start(runtime, aliases=("gpt-4o-mini", "org/name"))
    with httpx.Client(base_url=server.url) as client:
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["toy", "gpt-4o-mini", "org/name"]
        assert client.get("/v1/models/org/name").json()["id"] == "org/name"
        body = {"model": "org/name", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        assert client.post("/v1/chat/completions", json=body).json()["model"] == "org/name"


def test_an_unknown_model_is_not_found(api: httpx.Client) -> None:
    for response in (
        api.get("/v1/models/nope/x"),
        api.post("/v1/chat/completions", json={"model": "nope/x", "messages": [{"role": "user", "content": "x"}]}),
    ):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"


def test_while_loading_everything_says_so(start: Any) -> None:
    server = start()
    server.service.loading("waiting for worker attic at 10.0.0.7:10128")
    with httpx.Client(base_url=server.url) as client:
        for response in (
            client.get("/health"),
            client.get("/v1/models"),
            client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]}),
        ):
            assert response.status_code == 503
            error = response.json()["error"]
            assert error["code"] == "model_loading"
            assert "attic" in error["message"]
            assert "retry-after" in response.headers


def test_health_is_ok_when_it_is(api: httpx.Client) -> None:
    for path in ("/health", "/v1/health"):
        assert api.get(path).json() == {"status": "ok", "model": "toy"}


def test_request_ids_are_given_and_kept(api: httpx.Client) -> None:
    assert api.get("/health").headers["x-request-id"].startswith("req_")
    assert api.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert api.get("/nothing").headers["x-request-id"]
    assert api.get("/health", headers={"x-request-id": 'a"b c'}).headers["x-request-id"].startswith("req_")


def test_metrics_count_requests_and_tokens(start: Any, runtime: TextRuntime) -> None:
    server = start(runtime)
    with httpx.Client(base_url=server.url) as client:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "ignore_eos": True}
        client.post("/v1/chat/completions", json=body).raise_for_status()
        client.get("/v1/models/nope")
        client.get("/no/such/path")
        text = client.get("/metrics").text
    assert 'cake_requests_total{endpoint="/v1/chat/completions",status="200"} 1.0' in text
    assert 'cake_requests_total{endpoint="/v1/models/{model_id}",status="404"} 1.0' in text
    assert 'cake_requests_total{endpoint="other",status="404"} 1.0' in text
    assert "cake_generation_tokens_total 5.0" in text
    assert "cake_prompt_tokens_total 6.0" in text
    assert "cake_time_to_first_token_seconds_count 1.0" in text
    assert "cake_inter_token_latency_seconds_count 4.0" in text
    assert "cake_requests_running 0.0" in text
    assert "cake_kv_cache_usage_ratio" in text
