"""`cake status`: what a running `cake serve` says of its cluster, at a terminal."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

from cake_core.cli.console import human_bytes, human_seconds, note, show_json, show_table
from cake_core.errors import CakeError, ConfigError, NodeUnreachable

TIMEOUT = 15.0
"""Longer than the keep-alive comments of the event stream are apart."""


def show(url: str, key: str | None, follow: bool, as_json: bool) -> None:
    """Prints the state once, or, to `follow`, whenever something changes. Raises NodeUnreachable when nobody answers."""
    base = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
    if not follow:
        _print(json.loads(_read(f"{base}/api/v1/cluster", key)), as_json)
        return
    last: Any = None
    for body in _events(f"{base}/api/v1/cluster/events", key):
        shown = {name: body[name] for name in ("status", "detail", "nodes") if name in body}
        for node in shown.get("nodes", []):
            node.pop("traffic", None)  # which changes all the time
        if shown != last:
            _print(body, as_json)
        last = shown


def _request(url: str, key: str | None) -> Any:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)  # noqa: S310 - http(s) below
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise ConfigError(f"{url} wants a key; give it with --api-key or CAKE_API_KEY") from error
        raise NodeUnreachable(f"{url} answers {error.code}; is it `cake serve`?") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise NodeUnreachable(f"nobody answers at {url} ({reason}); is `cake serve` running there?") from error


def _read(url: str, key: str | None) -> bytes:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is not a URL; write http://host:port")
    with _request(url, key) as answer:
        body: bytes = answer.read()
    return body


def _events(url: str, key: str | None) -> Iterator[dict[str, Any]]:
    with _request(url, key) as stream:
        for line in stream:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])
    raise CakeError("the server ended the stream; it is stopping")


def _print(body: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(body)
        return
    model = f" {body['model']} ({body['architecture']}, {body['dtype']})" if body.get("model") else ""
    note(f"{body['status']}{model}" + (f": {body['detail']}" if body.get("detail") else ""))
    for what, (done, total) in body.get("loading", {}).items():
        note(f"  {what}: {human_bytes(done)} of {human_bytes(total)}")
    rows = [_row(node) for node in body.get("nodes", [])]
    if rows:
        show_table(("node", "address", "state", "layers", "bytes", "KV free", "sent", "received"), rows, right=(4, 5, 6, 7))
    engine = body.get("engine", {})
    note(f"{engine.get('running', 0)} running, {engine.get('waiting', 0)} waiting")


def _row(node: Mapping[str, Any]) -> tuple[str, ...]:
    state = node["state"]
    if state not in ("up", "draining") and node.get("since"):
        state = f"{state} for {human_seconds(max(0.0, time.time() - node['since']))}: {node.get('error', '')}"
    memory, traffic = node.get("memory", []), node.get("traffic", {})
    free = sum(entry.get("kv_tokens_free", 0) for entry in memory)
    return (
        node["name"],
        str(node.get("address") or "-").removeprefix("tcp://"),
        state,
        ", ".join(node["layers"]) or "-",
        human_bytes(node["nbytes"]),
        str(free) if free else "-",
        human_bytes(traffic.get("bytes_sent", 0)),
        human_bytes(traffic.get("bytes_received", 0)),
    )
