"""One measured request: a streamed chat completion over asyncio's own sockets, so that the client costs little itself."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from cake_core.errors import CakeError, ConfigError

LINE_LIMIT = 4_000_000


@dataclass(frozen=True, slots=True)
class Target:
    """Where to send: the parts of a base URL, with or without its `/v1`."""

    host: str
    port: int
    path: str
    tls: bool
    key: str | None

    @classmethod
    def parse(cls, url: str, key: str | None) -> Target:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{url!r} has no valid port") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is not a URL; write http://host:port")
        path = parts.path.rstrip("/")
        tls = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if tls else 80), path if path.endswith("/v1") else f"{path}/v1", tls, key)

    @property
    def headers(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        key = f"authorization: Bearer {self.key}\r\n" if self.key else ""
        return f"host: {host}:{self.port}\r\n{key}connection: close\r\n"


@dataclass(slots=True)
class Sample:
    """One request's times, in seconds of the monotonic clock. `times` has one entry a chunk with text in it."""

    start: float
    times: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""


async def exchange(target: Target, method: str, path: str, body: bytes = b"") -> tuple[int, asyncio.StreamReader, Any]:
    """Sends a request; gives status, the reader at the start of the body, and the writer to close."""
    context = ssl.create_default_context() if target.tls else None
    reader, writer = await asyncio.open_connection(target.host, target.port, ssl=context, limit=LINE_LIMIT)
    head = f"{method} {target.path}{path} HTTP/1.1\r\n{target.headers}content-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    status = (await reader.readline()).split()
    if len(status) < 2 or not status[1].isdigit():
        writer.close()
        raise ConnectionError("the answer is not HTTP")
    while (await reader.readline()).strip():
        pass
    return int(status[1]), reader, writer


async def first_model(target: Target) -> str:
    """The first model the server lists. Raises CakeError when it lists none."""
    try:
        status, reader, writer = await exchange(target, "GET", "/models")
        text = (await reader.read()).decode("utf-8", "replace")
        writer.close()
    except (OSError, ConnectionError) as error:
        raise CakeError(f"cannot reach {target.host}:{target.port}: {error}; is the server running?") from error
    start = text.find("{")
    try:
        return str(json.JSONDecoder().raw_decode(text, start)[0]["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise CakeError(f"{target.host}:{target.port} lists no model (HTTP {status}); name one with --model") from error


async def measure(target: Target, body: bytes, timeout: float) -> Sample:
    """Runs one request to its end. What goes wrong is in the sample's `error`, never raised."""
    sample = Sample(time.monotonic())
    writer = None
    try:
        async with asyncio.timeout(timeout):
            status, reader, writer = await exchange(target, "POST", "/chat/completions", body)
            if status != 200:
                sample.error = f"HTTP {status}"
            else:
                await _read(reader, sample)
    except TimeoutError:
        sample.error = "timeout"
    except (OSError, ValueError) as error:
        sample.error = type(error).__name__
    finally:
        if writer is not None:
            writer.close()
    sample.end = time.monotonic()
    return sample


async def _read(reader: asyncio.StreamReader, sample: Sample) -> None:
    """Reads events line by line; the lines of chunked encoding between them are none of ours and pass by."""
    done = False
    while line := await reader.readline():
        if not line.startswith(b"data: "):
            continue
        payload = line[6:].strip()
        if payload == b"[DONE]":
            done = True
            break
        _take(json.loads(payload), sample)
    if not done and not sample.error:
        sample.error = "the stream was cut"


def _take(chunk: Any, sample: Sample) -> None:
    if "error" in chunk:
        sample.error = str(chunk["error"].get("code") or "error in the stream")
    if usage := chunk.get("usage"):
        sample.prompt_tokens, sample.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    for choice in chunk.get("choices", ()):
        delta = choice.get("delta", {})
        if delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or delta.get("tool_calls"):
            sample.times.append(time.monotonic())
