"""Puts the application together: routes, error handlers, and the edge around them."""

from __future__ import annotations

from typing import Any

from litestar import Litestar, Request, Response
from litestar.datastructures import State
from litestar.di import Provide
from litestar.exceptions import HTTPException, ValidationException
from litestar.types import ASGIApp

from cake_server.edge.app import Edge
from cake_server.errors import ApiError, error_body, to_api_error
from cake_server.openapi import openapi_config
from cake_server.routes import ROUTES
from cake_server.service import Service

_BODY = "the body is empty; send a JSON object"


def create_app(service: Service) -> ASGIApp:
    """The ASGI application over a service, which may still be loading its model."""
    app = Litestar(
        route_handlers=list(ROUTES),
        dependencies={"service": Provide(lambda: service, sync_to_thread=False)},
        exception_handlers={HTTPException: _http_error, Exception: _any_error},
        openapi_config=openapi_config(),
        logging_config=None,
        request_max_body_size=None,  # the edge counts, for every path
        state=State({"service": service}),
        debug=False,
    )
    return Edge(app, service)


def _http_error(_request: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    return _answer(from_http(error))


def _any_error(_request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    return _answer(to_api_error(error))


def _answer(error: ApiError) -> Response[Any]:
    return Response(error_body(error), status_code=error.status, headers=error.headers, media_type="application/json")


def from_http(error: HTTPException) -> ApiError:
    """Litestar's own errors: no such path or method, and bodies that do not parse."""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, RecursionError):
        return to_api_error(cause)
    if isinstance(cause, ApiError):
        return cause
    if error.status_code == 404:
        return ApiError(404, "there is nothing here; see /docs for the paths of this API", "not_found")
    if error.status_code == 405:
        return ApiError(405, "this path does not take this method; see /docs", "method_not_allowed", headers=error.headers)
    if isinstance(error, ValidationException) and isinstance(error.extra, list) and error.extra:
        first = error.extra[0]
        param, message = first.get("key") or None, first.get("message", "invalid")
        if param == "data":  # the handlers' name for the body
            param, message = None, _BODY if message == "'data'" else f"the body: {message}"
        return ApiError(400, f"{param}: {message}" if param else message, None, param)
    return ApiError(error.status_code, error.detail or "the request is not valid", None)
