"""What one request's log line says; routes fill in what only they know."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
from litestar.types import Scope

log = logging.getLogger("cake_server.access")

KEY = "cake.record"


@dataclass(slots=True)
class Record:
    """One HTTP request. `endpoint` is its route's template, so that metrics have few labels."""

    id: str
    method: str
    path: str
    client: str
    endpoint: str = "other"
    status: int = 0
    started: float = field(default_factory=time.perf_counter)
    facts: dict[str, Any] = field(default_factory=dict)

    def write(self, as_json: bool) -> None:
        """One line, as `key=value` or JSON. Values a client chose are quoted, so none can forge a second line."""
        facts: dict[str, Any] = {
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(time.perf_counter() - self.started, 4),
            "id": self.id,
            "client": self.client,
            **self.facts,
        }
        if as_json:
            log.info("%s", msgspec.json.encode(facts).decode())
        else:
            log.info("%s", " ".join(f"{key}={_quoted(value)}" for key, value in facts.items()))


def _quoted(value: Any) -> str:
    text = str(value)
    plain = text.isascii() and text.isprintable() and not any(char in text for char in ' "=')
    return text if plain and text else msgspec.json.encode(text.encode("utf-8", "replace").decode()).decode()


def record_of(scope: Scope) -> Record:
    return cast("Record", cast("dict[str, Any]", scope)[KEY])
