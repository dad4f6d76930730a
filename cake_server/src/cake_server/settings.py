"""What an operator decides about the server; everything has a value that is safe on a laptop."""

from __future__ import annotations

from dataclasses import dataclass, field

from cake_core.errors import ConfigError
from cake_core.requests import SamplingDefaults

MEGABYTE = 1_000_000


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one server.

    Attributes:
        api_keys: any of them opens the API; none leaves it open to every accepted host.
        allowed_hosts: names, beyond this machine's own, that a `Host` header may carry when there is no key.
        cors_origins: origins (`https://chat.example`) whose pages may call the API; `*` for all.
        aliases: further names clients may use for the model.
        max_body, max_image_body, max_header_bytes: limits in bytes.
        max_requests: most generations at once over all connections, beyond the engine's own queue.
        max_choices: most answers of one request (`n` times prompts of it).
        keep_alive: seconds without an event after which a comment keeps the connection open.
        first_event_wait: seconds a stream's status line is held back, so that an early failure keeps its HTTP status.
        stall_timeout: seconds after which a client that does not read is dropped.
        max_unread: events a slow client may leave unread before its request is cancelled.
        sampling, max_tokens: defaults over the model's own; None leaves them to the model.
        max_pixels, max_steps: limits of an image job.
    """

    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    max_body: int = 10 * MEGABYTE
    max_image_body: int = 50 * MEGABYTE
    max_header_bytes: int = 32_768
    max_requests: int = 1024
    max_choices: int = 512
    keep_alive: float = 10.0
    first_event_wait: float = 0.3
    stall_timeout: float = 60.0
    max_unread: int = 8192
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    repeat_last_n: int | None = None
    max_tokens: int | None = None
    seed: int | None = None
    max_pixels: int = 2048 * 2048
    max_steps: int = 500
    log_json: bool = False

    def __post_init__(self) -> None:
        if any(not key.strip() for key in self.api_keys):
            raise ConfigError("an API key must not be empty; give --api-key a value or leave it out")
        for name in ("max_body", "max_image_body", "max_header_bytes", "max_requests", "max_choices", "max_unread"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for origin in self.cors_origins:
            if origin != "*" and "://" not in origin:
                raise ConfigError(f"--cors-origin needs an origin like https://chat.example, not {origin!r}")
