"""The outermost ASGI application: request ids, access, limits, CORS, the log line, and an error body on every path."""

from __future__ import annotations

import re
import secrets
from typing import Any, cast

from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from cake_server.edge.access import Gate
from cake_server.edge.record import KEY, Record
from cake_server.errors import ApiError, encode_error, to_api_error
from cake_server.service import Service

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.\-]{1,128}")
_MULTIPART = "/v1/images/edits"
_CORS_HEADERS = "authorization, content-type, x-api-key, x-request-id"


class Edge:
    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._gate = Gate(service.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if str(scope["type"]) != "http":
            if str(scope["type"]) == "lifespan":
                await self._app(scope, receive, send)
            return
        await _Exchange(self, cast("HTTPScope", scope), receive, send).run()

    @property
    def app(self) -> ASGIApp:
        return self._app

    @property
    def gate(self) -> Gate:
        return self._gate

    @property
    def service(self) -> Service:
        return self._service


class _Exchange:
    """One request and its response."""

    def __init__(self, edge: Edge, scope: HTTPScope, receive: Receive, send: Send) -> None:
        # A HEAD is a GET whose body the protocol leaves out.
        answered = cast("HTTPScope", {**scope, "method": "GET"}) if scope["method"] == "HEAD" else scope
        self._edge, self._scope, self._receive, self._send = edge, answered, receive, send
        self._settings = edge.service.settings
        self._headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = self._headers.get("x-request-id", "")
        client = scope.get("client")
        self._record = Record(
            id=given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}",
            method=scope["method"],
            path=scope["path"],
            client=client[0] if client else "-",
        )
        self._limit = self._settings.max_image_body if scope["path"] == _MULTIPART else self._settings.max_body
        self._received = 0
        self._over_limit = False

    async def run(self) -> None:
        metrics = self._edge.service.metrics
        scope = cast("dict[str, Any]", self._scope)
        scope[KEY] = self._record
        metrics.streams.inc()
        try:
            await self._answer()
        finally:
            metrics.streams.dec()
            self._record.endpoint = scope.get("path_template", "other")
            metrics.requests.labels(self._record.endpoint, str(self._record.status)).inc()
            self._record.write(self._settings.log_json)

    async def _answer(self) -> None:
        try:
            self._check_size()
            self._edge.gate.check(self._scope["method"], self._scope["path"], self._headers)
            if self._is_preflight():
                await self._reply(204, b"", {"access-control-max-age": "600"})
                return
            await self._edge.app(self._scope, self._limited_receive, self._tagged_send)
        except Exception as error:  # the last place where a client can still be told
            if self._record.status:
                raise
            failure = to_api_error(error)
            await self._reply(failure.status, encode_error(failure), failure.headers)

    def _check_size(self) -> None:
        if sum(len(name) + len(value) for name, value in self._scope["headers"]) > self._settings.max_header_bytes:
            raise ApiError(431, f"the headers have more than {self._settings.max_header_bytes} bytes", "headers_too_large")
        length = self._headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > self._limit:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        # The rest of the body is not read, so the connection cannot be used again.
        return ApiError(413, f"the body has more than {self._limit} bytes", "body_too_large", headers={"connection": "close"})

    async def _limited_receive(self) -> Any:
        message = await self._receive()
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            if self._received > self._limit:
                raise self._too_large()
        return message

    def _is_preflight(self) -> bool:
        return self._scope["method"] == "OPTIONS" and "access-control-request-method" in self._headers

    async def _tagged_send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            message["headers"] = [*message["headers"], *self._extra_headers()]
        await self._send(message)

    def _extra_headers(self) -> list[tuple[bytes, bytes]]:
        extra = [(b"x-request-id", self._record.id.encode()), (b"x-content-type-options", b"nosniff")]
        origin = self._headers.get("origin", "")
        if self._edge.gate.cors_allows(origin):
            extra += [
                (b"access-control-allow-origin", origin.encode("latin-1")),
                (b"access-control-allow-headers", _CORS_HEADERS.encode()),
                (b"access-control-allow-methods", b"GET, POST, DELETE, OPTIONS"),
                (b"access-control-expose-headers", b"x-request-id, retry-after"),
                (b"vary", b"origin"),
            ]
        return extra

    async def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        fixed = [] if status == 204 else [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        given = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        start: Any = {"type": "http.response.start", "status": status, "headers": [*fixed, *given]}
        await self._tagged_send(start)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
