"""The OpenAPI document: Litestar's, with what it cannot know put right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from litestar import Litestar, Request, Response, Router
from litestar.enums import OpenAPIMediaType
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import OpenAPIRenderPlugin

from cake_core import __version__
from cake_server.errors import ApiError, error_body

_STREAMING = (
    "/v1/chat/completions",
    "/api/v1/chat/completions",
    "/v1/completions",
    "/v1/images/generations",
    "/v1/images/edits",
    "/api/v1/image",
    "/api/v1/cluster/events",
)
_ALIASES = (
    "/chat/completions",
    "/completions",
    "/embeddings",
    "/images/generations",
    "/images/edits",
    "/models",
    "/v1/tokenize",
    "/v1/detokenize",
    "/api/v1/topology",
)
"""Other spellings of a path, for clients that expect them; documenting each thing once is enough."""
_PUBLIC = ("/health", "/v1/health")


class _Json(OpenAPIRenderPlugin):
    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return document(request.app)


def _plain_not_found(response: Response[Any]) -> Response[Any]:
    """Litestar answers unknown paths beside the document with a page of its own; ours have one shape of error."""
    if response.status_code != 404:
        return response
    error = ApiError(404, "there is nothing here; see /docs", "not_found")
    return Response(error_body(error), status_code=404, media_type="application/json")


def openapi_config() -> OpenAPIConfig:
    """The document at /schema/openapi.json and nothing beside it: Litestar's own pages load scripts from other hosts."""
    return OpenAPIConfig(
        title="Cake",
        version=__version__,
        use_handler_docstrings=True,
        description="OpenAI-compatible API of a Cake cluster. Unknown fields are ignored; `null` is every field's default.",
        openapi_router=Router("/schema", route_handlers=[], include_in_schema=False, after_request=_plain_not_found),
        render_plugins=(_Json(path="/openapi.json", media_type=OpenAPIMediaType.OPENAPI_JSON),),
    )


def document(app: Litestar) -> bytes:
    """The document as JSON; made once an application."""
    known: bytes | None = app.state.get("openapi_document")
    if known is None:
        known = app.state.openapi_document = msgspec.json.encode(_improved(app.openapi_schema.to_schema()))
    return known


def _improved(schema: dict[str, Any]) -> dict[str, Any]:
    components = schema.setdefault("components", {})
    for item in components.get("schemas", {}).values():
        if item.get("type") == "object":
            item["additionalProperties"] = True  # unknown fields are ignored, and answers may gain some
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path in _ALIASES:
        schema["paths"].pop(path)
    for path, method, operation in _operations(schema):
        operation.pop("deprecated", None)
        if path not in _PUBLIC:
            operation["security"] = [{}, {"key": []}]
        if path in _STREAMING:
            content = operation["responses"]["200"].setdefault("content", {})
            content["text/event-stream"] = {"schema": {"type": "string"}}
        if method == "post":
            _name_bad_request(operation)
    edits = schema["paths"].get("/v1/images/edits", {}).get("post")
    if edits is not None:
        edits["requestBody"] = _multipart(components)
    return schema


def _operations(schema: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            if isinstance(operation, dict) and "responses" in operation:
                yield path, method, operation


def _name_bad_request(operation: dict[str, Any]) -> None:
    """Litestar documents its own shape of a 400; ours is that of every error."""
    responses = operation["responses"]
    if "404" in responses and "400" in responses:
        responses["400"] = {**responses["404"], "description": "The request is wrong; `param` names the field."}


def _multipart(components: dict[str, Any]) -> dict[str, Any]:
    fields = components["schemas"]["ImageGeneration"]["properties"]
    file = {"type": "string", "format": "binary"}
    schema = {"type": "object", "required": ["image", "prompt"], "properties": {"image": file, "mask": file, **fields}}
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
