"""From an error to HTTP: the one place that knows statuses. Every error leaves as `{"error": {message, type, param, code}}`.

::

    RequestError, ConfigError        400 invalid_request_error     Cancelled       499 (the log only: nobody is left to read it)
    QueueFullError                   429 rate_limit_error          NodeError       503 unavailable_error, cluster_degraded
    CapacityError, TransportError    503 unavailable_error         anything else   500 server_error, without details
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from cake_core.errors import (
    CakeError,
    Cancelled,
    CapacityError,
    ConfigError,
    ContextLengthError,
    NodeError,
    QueueFullError,
    RequestError,
    TransportError,
)

log = logging.getLogger(__name__)

INVALID = "invalid_request_error"
UNAVAILABLE = "unavailable_error"
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(CakeError):
    """An error that knows its own HTTP status: what only this edge can find wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error_code = code
        self.param = param
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})

    @property
    def type(self) -> str:
        if self.status in _TYPES:
            return _TYPES[self.status]
        if self.status < 500:
            return INVALID
        return {501: "not_implemented", 503: UNAVAILABLE}.get(self.status, "server_error")


def unsupported(param: str, message: str) -> ApiError:
    """400 for a field that is known, cannot be honoured and would change the answer."""
    return ApiError(400, message, "unsupported_parameter", param)


def unavailable(message: str, code: str, retry_after: int = 2) -> ApiError:
    return ApiError(503, message, code, headers={"retry-after": str(retry_after)})


def to_api_error(error: BaseException) -> ApiError:
    """What a client is told about an error. Logs the ones that are bugs, with their traceback."""
    if isinstance(error, ApiError):
        return error
    message = str(error)
    if isinstance(error, ContextLengthError):
        return ApiError(400, message, "context_length_exceeded", error.param or "messages")
    if isinstance(error, RequestError):
        return ApiError(400, message, None if error.code == RequestError.code else error.code, error.param)
    if isinstance(error, QueueFullError):
        return ApiError(429, message, "queue_full", headers={"retry-after": "1"})
    if isinstance(error, Cancelled):
        return ApiError(499, message or "the request was cancelled", "cancelled")
    if isinstance(error, NodeError):
        return unavailable(message, "cluster_degraded", 5)
    if isinstance(error, CapacityError | TransportError):
        return unavailable(message, error.code)
    if isinstance(error, ConfigError):
        return ApiError(400, message, error.code)
    if isinstance(error, RecursionError):
        return ApiError(400, "the body is nested too deeply; flatten it", "nesting_too_deep")
    if isinstance(error, CakeError):
        log.error("request failed: %s", message)
        return ApiError(500, message, error.code)
    log.error("unexpected error", exc_info=error)
    return ApiError(500, "the server failed at this request; its log has the details under this x-request-id", "internal_error")


def error_body(error: ApiError) -> dict[str, Any]:
    detail = {"message": str(error), "type": error.type, "param": error.param, "code": error.error_code}
    return {"error": {**detail, **error.extra}}


def encode_error(error: ApiError) -> bytes:
    return msgspec.json.encode(error_body(error))
