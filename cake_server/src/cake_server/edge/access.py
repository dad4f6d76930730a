"""Who may call. Without a key only this machine's names, addresses and `.local` are hosts, and no foreign page gets in:
that is what stops a web site from reaching the server through a visitor's browser (cross-site requests, DNS rebinding)."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import urlsplit

from cake_server.errors import ApiError
from cake_server.settings import Settings

PUBLIC = ("/", "/health", "/v1/health", "/docs", "/schema/openapi.json", "/favicon.ico")
_PUBLIC_PREFIX = "/ui/"
_SAFE = ("GET", "HEAD", "OPTIONS")


class Gate:
    """Decides about one request from its method, path and headers (names in lower case)."""

    def __init__(self, settings: Settings) -> None:
        self._digests = [_digest(key) for key in settings.api_keys]
        self._hosts = {host.lower().rstrip(".") for host in settings.allowed_hosts}
        self._origins = {origin.lower().rstrip("/") for origin in settings.cors_origins}

    def check(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Raises ApiError 401 or 403."""
        if self._digests:
            if method != "OPTIONS" and not is_public(path):
                self._check_key(headers)
            return
        self._check_host(headers.get("host", ""))
        self._check_origin(method, headers)

    def _check_key(self, headers: Mapping[str, str]) -> None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest, found = _digest(key), False
        for known in self._digests:  # all of them, always: time tells nothing
            found |= hmac.compare_digest(digest, known)
        if not found:
            hint = "wrong API key" if key else "missing API key; send `Authorization: Bearer KEY` or `x-api-key: KEY`"
            raise ApiError(401, hint, "invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _check_host(self, host: str) -> None:
        name = host_name(host)
        if not (own_host(name) or name in self._hosts):
            raise ApiError(
                403,
                f"the host {name[:200]!r} is not one of this machine's names; add it with --allowed-host, or set --api-key",
                "host_not_allowed",
            )

    def _check_origin(self, method: str, headers: Mapping[str, str]) -> None:
        origin = headers.get("origin", "").lower()
        if origin:
            if not (self.cors_allows(origin) or same_origin(origin, headers.get("host", ""))):
                message = f"pages of {origin[:200]!r} may not call this server; allow them with --cors-origin, or set --api-key"
                raise ApiError(403, message, "origin_not_allowed")
        elif headers.get("sec-fetch-site") == "cross-site" and method not in _SAFE:
            raise ApiError(403, "cross-site requests are refused; set --api-key to allow them", "origin_not_allowed")

    def cors_allows(self, origin: str) -> bool:
        return bool(origin) and ("*" in self._origins or origin.lower() in self._origins)


def is_public(path: str) -> bool:
    """The page itself and /health hold no secrets; every call the page makes is checked."""
    return path in PUBLIC or path.startswith(_PUBLIC_PREFIX)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def host_name(host: str) -> str:
    """The name in a Host header, in lower case, without port and brackets."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def same_origin(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc == host.strip().lower() != ""
    except ValueError:
        return False


def own_host(name: str) -> bool:
    """IP literals (a rebinding attack needs a name), localhost, `.local`, and the names this machine calls itself."""
    name = name.rstrip(".")
    if name == "localhost" or name.endswith((".localhost", ".local")) or name in _machine_names():
        return True
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True


@lru_cache(maxsize=1)
def _machine_names() -> frozenset[str]:
    name = socket.gethostname().lower()
    return frozenset(filter(None, (name, name.partition(".")[0])))
