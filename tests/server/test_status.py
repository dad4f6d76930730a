"""`cake status` against a running server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from cake_core.errors import CakeError, ConfigError, NodeUnreachable
from cake_core.runtime import TextRuntime
from cake_server.status import show
from cake_server.testing import LiveServer


def test_the_cluster_is_shown(
    runtime: TextRuntime, start: Callable[..., LiveServer], capsys: pytest.CaptureFixture[str]
) -> None:
    server = start(runtime)
    show(server.url, None, follow=False, as_json=False)
    shown = capsys.readouterr()
    assert "ok toy (ToyForCausalLM, f32)" in shown.err
    assert "0 running, 0 waiting" in shown.err
    assert "master  -        up     model.embed_tokens, model.layers.0-3, model.norm, lm_head" in shown.out
    show(f"{server.url}/v1", None, follow=False, as_json=True)
    assert json.loads(capsys.readouterr().out)["nodes"][0]["name"] == "master"


def test_following_ends_with_the_server(
    runtime: TextRuntime, start: Callable[..., LiveServer], capsys: pytest.CaptureFixture[str]
) -> None:
    server = start(runtime)
    timer = threading.Timer(0.5, server.stop)
    timer.start()
    with pytest.raises(CakeError):
        show(server.url, None, follow=True, as_json=False)
    timer.join()
    assert capsys.readouterr().out.count("master") == 1, "what did not change is not shown again"


def test_who_cannot_be_asked_is_told_why(runtime: TextRuntime, start: Callable[..., LiveServer]) -> None:
    server = start(runtime, api_keys=("secret-key",))
    with pytest.raises(ConfigError, match="wants a key"):
        show(server.url, None, follow=False, as_json=False)
    show(server.url, "secret-key", follow=False, as_json=True)
    server.stop()
    with pytest.raises(NodeUnreachable, match="nobody answers"):
        show(server.url, None, follow=False, as_json=False)
    with pytest.raises(ConfigError, match="not a URL"):
        show("file:///etc/passwd", None, follow=False, as_json=False)


def test_a_node_that_is_missing_is_shown_with_since_when(capsys: pytest.CaptureFixture[str]) -> None:
    from cake_server.status import _print

    node: dict[str, Any] = {
        "name": "w", "address": "tcp://h:1", "state": "down", "layers": ["lm_head"], "nbytes": 10, "since": 1.0,
        "error": "gone",
    }  # fmt: skip
    _print({"status": "degraded", "detail": "missing: w", "nodes": [node], "loading": {"w fetching": [1, 2]}}, False)
    shown = capsys.readouterr()
    assert "degraded: missing: w" in shown.err
    assert "w fetching: 1 B of 2 B" in shown.err
    assert "h:1" in shown.out
    assert ": gone" in shown.out
