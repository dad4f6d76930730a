"""uvicorn's HTTP protocol with what it lacks: a bound on unfinished headers and on silent connections, and a way to drop a
client that does not read."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any, cast

from cake_server.errors import ApiError, encode_error
from cake_server.sse import ABORT

HEADER_LIMIT = 65_536
FIRST_REQUEST_TIMEOUT = 30.0


def http_protocol() -> type[asyncio.Protocol]:
    """The fastest protocol that is installed (httptools, else h11), hardened."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as Base
    except ImportError:
        from uvicorn.protocols.http.h11_impl import H11Protocol as Base  # type: ignore[assignment]
    return _harden(Base)


def _harden(base: Any) -> type[asyncio.Protocol]:
    class HardenedProtocol(base):  # type: ignore[misc]
        _in_headers = True
        _header_bytes = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            app = cast("Any", self).app

            async def with_abort(scope: Any, receive: Any, send: Any) -> None:
                scope[ABORT] = transport.abort
                await app(scope, receive, send)

            cast("Any", self).app = with_abort
            self._patience = self.loop.call_later(FIRST_REQUEST_TIMEOUT, self._check_started)

        def connection_lost(self, exc: Exception | None) -> None:
            self._patience.cancel()
            super().connection_lost(exc)

        def _check_started(self) -> None:
            if self.cycle is None:
                self.transport.close()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._in_headers:
                self._header_bytes += len(data)
                if self._header_bytes > HEADER_LIMIT:
                    self.transport.abort()

        def send_400_response(self, msg: str) -> None:
            self.transport.write(_not_http())
            self.transport.close()

        # httptools calls these; h11 bounds unfinished headers itself.

        def on_message_begin(self) -> None:
            self._in_headers, self._header_bytes = True, 0
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._in_headers = False
            super().on_headers_complete()

    if not hasattr(base, "on_headers_complete"):
        HardenedProtocol._in_headers = False
    return HardenedProtocol


def _not_http() -> bytes:
    """The answer to what no HTTP parser takes: it never gets as far as the application, and reads like its errors."""
    body = encode_error(ApiError(400, "this is not HTTP/1.1", "invalid_http"))
    head = f"content-type: application/json\r\nx-request-id: req_{secrets.token_hex(12)}\r\ncontent-length: {len(body)}\r\n"
    return f"HTTP/1.1 400 Bad Request\r\n{head}connection: close\r\n\r\n".encode() + body
