"""The web page, the OpenAPI document and its reference page: all from this package, nothing from another host."""

from __future__ import annotations

import mimetypes
from importlib.resources import files

from litestar import Response, get

from cake_server.errors import ApiError
from cake_server.openapi import document
from cake_server.reference import reference_page
from cake_server.routes.common import AnyRequest

WEB = files("cake_server") / "web"
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
)
_HEADERS = {"content-security-policy": POLICY, "referrer-policy": "no-referrer"}
_TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}


@get("/", include_in_schema=False)
async def index() -> Response[bytes]:
    """The page."""
    return _file("index.html")


@get(["/ui/{name:str}", "/favicon.ico"], include_in_schema=False)
async def static(request: AnyRequest) -> Response[bytes]:
    """Its files; all lie in one folder, so a name has no slash."""
    return _file(request.path_params.get("name", "favicon.svg"))


def _file(name: str) -> Response[bytes]:
    found = next((entry for entry in WEB.iterdir() if entry.name == name and entry.is_file()), None)
    if found is None:
        raise ApiError(404, "there is nothing here", "not_found")
    suffix = f".{name.rpartition('.')[2]}"
    kind = _TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    kind = kind if kind.startswith("text/") else f"{kind}; charset=utf-8"  # which Litestar adds to texts
    return Response(found.read_bytes(), media_type=kind, headers={**_HEADERS, "cache-control": "no-cache"})


@get("/docs", include_in_schema=False)
async def docs(request: AnyRequest) -> Response[bytes]:
    """A reference page made from the OpenAPI document."""
    return Response(reference_page(document(request.app)), media_type="text/html", headers=_HEADERS)
