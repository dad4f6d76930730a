"""The reference page at /docs: plain HTML from the OpenAPI document, readable without a network and without scripts."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Cake API</title><link rel="icon" href="/ui/favicon.svg"><link rel="stylesheet" href="/ui/style.css"></head>
<body class="reference"><main><h1>Cake API</h1>
<p><a href="/">the page</a> · <a href="/schema/openapi.json">openapi.json</a></p>
"""
_MAX_DEPTH = 3


def reference_page(document: bytes) -> bytes:
    schema = msgspec.json.decode(document)
    parts = [_HEAD, *_contents(schema)]
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            if isinstance(operation, Mapping) and "responses" in operation:
                parts += _operation(schema, path, method, operation)
    parts.append("</main></body></html>\n")
    return "".join(parts).encode()


def _contents(schema: Mapping[str, Any]) -> Iterator[str]:
    yield "<ul>"
    for path, item in schema["paths"].items():
        for method in item:
            if method in ("get", "post", "delete"):
                anchor = _anchor(method, path)
                yield f'<li><a href="#{anchor}"><code>{method.upper()} {html.escape(path)}</code></a></li>'
    yield "</ul>\n"


def _operation(schema: Mapping[str, Any], path: str, method: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f'<section id="{_anchor(method, path)}"><h2><code>{method.upper()} {html.escape(path)}</code></h2>'
    yield f"<p>{html.escape(operation.get('description', ''))}</p>"
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        yield f"<h3>Request ({html.escape(kind)})</h3>"
        yield from _table(schema, content["schema"], 0)
    for status, response in operation["responses"].items():
        yield f"<h3>{html.escape(status)}</h3><p>{html.escape(response.get('description', ''))}</p>"
        if status == "200":
            for content in response.get("content", {}).values():
                yield from _table(schema, content.get("schema", {}), 0)
    yield "</section>\n"


def _anchor(method: str, path: str) -> str:
    return method + "".join(char if char.isalnum() else "-" for char in path)


def _table(schema: Mapping[str, Any], node: Mapping[str, Any], depth: int) -> Iterator[str]:
    node = _resolved(schema, node)
    properties = node.get("properties")
    if not properties or depth >= _MAX_DEPTH:
        return
    required = set(node.get("required", ()))
    yield "<table><tbody>"
    for name, child in properties.items():
        mark = " *" if name in required else ""
        yield f"<tr><td><code>{html.escape(name)}</code>{mark}</td><td>{html.escape(_type(schema, child))}</td><td>"
        for part in _objects(schema, child):
            yield from _table(schema, part, depth + 1)
        yield "</td></tr>"
    yield "</tbody></table>"


def _resolved(schema: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = node.get("$ref")
    if reference is None:
        return node
    found: Any = schema
    for part in reference.removeprefix("#/").split("/"):
        found = found[part]
    return dict(found)


def _objects(schema: Mapping[str, Any], node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The object schemas inside a type: itself, what a list holds, each alternative."""
    node = _resolved(schema, node)
    if "properties" in node:
        yield node
    for child in (*node.get("oneOf", ()), *node.get("anyOf", ()), *([node["items"]] if "items" in node else ())):
        yield from _objects(schema, child)


def _type(schema: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    node = _resolved(schema, node)
    alternatives = (*node.get("oneOf", ()), *node.get("anyOf", ()))
    if alternatives:
        return " or ".join(dict.fromkeys(_type(schema, child) for child in alternatives))
    kind = node.get("type", "any")
    if isinstance(kind, list):
        return " or ".join(kind)
    if kind == "array":
        return f"list of {_type(schema, node.get('items', {}))}"
    return str(kind)
