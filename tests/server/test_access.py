"""Who may call: keys, hosts, origins, CORS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from cake_core.errors import ConfigError
from cake_server.edge.access import Gate, host_name, own_host, same_origin
from cake_server.errors import ApiError
from cake_server.keys import collect_keys
from cake_server.settings import Settings


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1:8080", True),
        ("192.168.1.7:8080", True),
        ("[::1]:8080", True),
        ("[fe80::1]", True),
        ("localhost", True),
        ("LOCALHOST:80", True),
        ("attic.local:8080", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
        ("evil.example:80:90", False),
    ],
)
def test_own_hosts(host: str, own: bool) -> None:
    assert own_host(host_name(host)) is own


def test_same_origin() -> None:
    assert same_origin("http://127.0.0.1:8080", "127.0.0.1:8080")
    assert not same_origin("http://127.0.0.1:9090", "127.0.0.1:8080")
    assert not same_origin("null", "127.0.0.1:8080")
    assert not same_origin("http://[", "x")
    assert not same_origin("", "")


def test_a_foreign_host_or_page_is_refused_without_a_key(api: httpx.Client) -> None:
    assert api.get("/v1/models", headers={"host": "evil.example"}).json()["error"]["code"] == "host_not_allowed"
    for origin in ("https://evil.example", "null", "http://localhost:9"):
        response = api.post("/v1/chat/completions", json={}, headers={"origin": origin})
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "origin_not_allowed"
    refused = api.post("/v1/chat/completions", content=b"{}", headers={"sec-fetch-site": "cross-site"})
    assert refused.status_code == 403


def test_the_page_itself_may_call(api: httpx.Client, server: Any) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    response = api.post("/v1/chat/completions", json=body, headers={"origin": server.url, "sec-fetch-site": "same-origin"})
    assert response.status_code == 200


def test_keys_open_and_nothing_else_does(start: Any, runtime: Any) -> None:
    server = start(runtime, api_keys=("first", "sécond"))
    with httpx.Client(base_url=server.url) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic first"}, {"x-api-key": "firs"}):
            response = client.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
        good: list[dict[str, Any]] = [
            {"authorization": "Bearer first"},
            {"authorization": "bearer first"},
            {"x-api-key": "first"},
        ]
        for headers in good:
            assert client.get("/v1/models", headers=headers).status_code == 200
        assert client.post("/v1/chat/completions", content=b"{broken").status_code == 401, "the key comes before the body"
        for path in ("/health", "/", "/ui/app.js", "/docs", "/schema/openapi.json"):
            assert client.get(path).status_code == 200
        for path in ("/metrics", "/tokenizer_info", "/api/v1/cluster"):
            assert client.get(path).status_code == 401


def test_with_a_key_any_host_may_stand_in_front(start: Any, runtime: Any) -> None:
    server = start(runtime, api_keys=("k",))
    headers = {"host": "chat.example", "authorization": "Bearer k", "origin": "https://chat.example"}
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200


def test_cors_is_off_until_asked_for(start: Any, runtime: Any) -> None:
    preflight = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    closed, opened = start(runtime), start(runtime, cors_origins=("https://chat.example",))
    response = httpx.options(f"{closed.url}/v1/chat/completions", headers=preflight)
    assert "access-control-allow-origin" not in response.headers
    response = httpx.options(f"{opened.url}/v1/chat/completions", headers=preflight)
    assert response.status_code == 204
    assert response.headers["access-control-allow-origin"] == "https://chat.example"
    assert "authorization" in response.headers["access-control-allow-headers"]
    answer = httpx.post(f"{opened.url}/v1/chat/completions", content=b"{", headers={"origin": "https://chat.example"})
    assert answer.status_code == 400
    assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    other = httpx.post(f"{opened.url}/v1/chat/completions", content=b"{", headers={"origin": "https://evil.example"})
    assert other.status_code == 403


def test_an_allowed_host_is_allowed() -> None:
    gate = Gate(Settings(allowed_hosts=("Chat.Example.",)))
    gate.check("GET", "/v1/models", {"host": "chat.example:443"})
    with pytest.raises(ApiError, match="--allowed-host"):
        gate.check("GET", "/v1/models", {"host": "other.example"})


def test_keys_are_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nthree\n\nfour\n")
    monkeypatch.setenv("CAKE_API_KEY", "two, one")
    assert collect_keys(["one"], file) == ("one", "two", "three", "four")
    monkeypatch.delenv("CAKE_API_KEY")
    assert collect_keys([], None) == ()
    file.write_text("# none\n")
    for keys, path in (([""], None), ([], file), ([], tmp_path / "missing")):
        with pytest.raises(ConfigError):
            collect_keys(keys, path)
