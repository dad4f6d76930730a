"""The page and its files, the OpenAPI document, the reference page, the cluster, the load generator."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from cake_core.cli.main import make_cli
from cake_core.runtime import TextRuntime
from cake_server.bench.client import Sample
from cake_server.bench.report import percentile, spread, summary

WEB = files("cake_server") / "web"


def test_the_page_needs_nothing_from_elsewhere(api: httpx.Client) -> None:
    response = api.get("/")
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    for name in re.findall(r'(?:src|href)="([^"#]+)"', response.text):
        found = api.get(name)
        assert found.status_code == 200, name
        assert name.startswith("/")
    types = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    for entry in WEB.iterdir():
        found = api.get(f"/ui/{entry.name}")
        suffix = f".{entry.name.rpartition('.')[2]}"
        assert found.headers["content-type"].startswith(types.get(suffix, "text/html"))
        outside = re.findall(r"https?://(?!www\.w3\.org/)[\w.]+", found.text)
        assert outside == [], entry.name


def test_no_script_of_the_page_parses_html(api: httpx.Client) -> None:
    """What a model writes must never become markup."""
    for entry in WEB.iterdir():
        if entry.name.endswith(".js"):
            code = re.sub(r"//.*", "", entry.read_text("utf-8"))
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc", code)


def test_modules_import_only_one_another() -> None:
    names = {entry.name for entry in WEB.iterdir()}
    for entry in WEB.iterdir():
        for target in re.findall(r'from "\./([^"]+)"', entry.read_text("utf-8")):
            assert target in names


def test_the_document_describes_what_is_there(api: httpx.Client) -> None:
    document = api.get("/schema/openapi.json").raise_for_status().json()
    assert document["openapi"].startswith("3.1")
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert chat["responses"]["400"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
    for name, schema in document["components"]["schemas"].items():
        if schema.get("type") == "object":
            assert schema["additionalProperties"] is True, name
    for path, item in document["paths"].items():
        for operation in item.values():
            assert operation.get("description"), path
            assert operation["responses"], path
    assert "multipart/form-data" in document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    assert "/completions" not in document["paths"]


def test_the_reference_page_names_every_path_and_loads_nothing(api: httpx.Client) -> None:
    page = api.get("/docs").text
    for path in api.get("/schema/openapi.json").json()["paths"]:
        assert path in page
    assert "<script" not in page
    assert set(re.findall(r'(?:src|href)="(?!#)([^"]+)"', page)) <= {
        "/", "/ui/favicon.svg", "/ui/style.css", "/schema/openapi.json",
    }  # fmt: skip


def test_the_cluster_shows_its_layers(api: httpx.Client) -> None:
    body = api.get("/api/v1/cluster").json()
    assert (body["status"], body["model"], body["model_type"]) == ("ok", "toy", "text")
    (node,) = body["nodes"]
    assert (node["name"], node["state"]) == ("master", "up")
    assert "model.layers.0-3" in node["layers"]
    assert body["spans"][0]["nbytes"] == node["nbytes"] > 0
    assert body["engine"]["kv_tokens"] > 0


def test_changes_of_the_cluster_are_events(start: Any, runtime: TextRuntime) -> None:
    server = start()
    server.service.loaded("model.layers.0", 5, 10)
    with httpx.Client(base_url=server.url) as client, client.stream("GET", "/api/v1/cluster/events") as response:
        found = []
        for line in response.iter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line[6:]))
                if len(found) == 1:
                    server.service.ready(runtime)
                else:
                    break
    assert found[0]["status"] == "loading"
    assert found[0]["loading"] == {"model.layers.0": [5, 10]}
    assert found[1]["status"] == "ok"
    assert found[1]["nodes"][0]["name"] == "master"


def test_percentiles() -> None:
    assert percentile([3.0], 99) == 3.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert percentile([4.0, 1.0], 100) == 4.0
    assert spread([]) is None


def test_a_summary_counts_only_what_was_answered() -> None:
    good = Sample(0.0, [0.5, 0.6, 0.8], 1.0, 7, 3)
    bad = Sample(0.5, [], 2.0, error="HTTP 429")
    numbers = summary([good, bad])
    assert (numbers["requests"], numbers["completed"], numbers["errors"]) == (2, 1, {"HTTP 429": 1})
    assert numbers["output_tokens_per_second"] == 1.5
    assert numbers["time_to_first_token_ms"]["p50"] == 500
    assert numbers["time_per_token_ms"]["mean"] == pytest.approx(150)
    assert numbers["inter_token_ms"]["max"] == 200


@pytest.mark.parametrize("mode", [["--concurrency", "3"], ["--rate", "200"]])
def test_bench_serve(api: httpx.Client, server: Any, mode: list[str], tmp_path: Any) -> None:
    output = tmp_path / "bench.json"
    arguments = ["bench", "serve", server.url, "--requests", "6", "--output-tokens", "5", "--input-tokens", "4", *mode]
    result = CliRunner().invoke(make_cli(), [*arguments, "--json", "--output", str(output)])
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.stdout)
    assert numbers == json.loads(output.read_text())
    assert (numbers["model"], numbers["completed"], numbers["errors"]) == ("toy", 6, {})
    assert numbers["output_tokens"] == 30
    assert numbers["time_to_first_token_ms"]["p99"] > 0
    table = CliRunner().invoke(make_cli(), arguments)
    assert "time to first token" in table.stdout


def test_bench_serve_says_what_is_wrong(start: Any, runtime: TextRuntime) -> None:
    server = start(runtime, api_keys=("k",))
    refused = CliRunner().invoke(make_cli(), ["bench", "serve", server.url, "--model", "toy", "--requests", "2"])
    assert refused.exit_code == 1
    assert "HTTP 401" in refused.output
    keyed = ["bench", "serve", server.url, "--api-key", "k", "--requests", "2", "--output-tokens", "2"]
    assert CliRunner().invoke(make_cli(), keyed).exit_code == 0
    server.stop()
    gone = CliRunner().invoke(make_cli(), ["bench", "serve", server.url])
    assert gone.exit_code == 1
    assert "is the server running?" in gone.output
    assert CliRunner().invoke(make_cli(), ["bench", "serve", "ftp://x"]).exit_code == 2
