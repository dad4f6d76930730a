"""What the engines tell: events of a request (to its sink) and of the cluster (to the `cake_on_event` hook).

All are frozen; a consumer matches on the type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cake_core.errors import CakeError


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability (natural log) and the most likely alternatives at its place, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted for one request. `cached_tokens` of the prompt came from the prefix cache. `proposed` tokens of the
    answer were guessed and forwarded before they were drawn; `accepted` of them were drawn."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    proposed: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class PromptDone:
    """The prompt has been forwarded. `scores` has one entry a prompt token (None for the first) when asked for."""

    usage: Usage
    scores: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """`done` of `total` prompt tokens have been forwarded."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token and the text that became certain with it (possibly none)."""

    token: int
    text: str
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Embedding:
    """Final hidden states of the prompt's positions, f32 row-major [positions, width]."""

    width: int
    data: bytes


FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request that ended well. `text` is what the detokenizer still held back."""

    reason: FinishReason
    text: str
    usage: Usage
    stop: str | int | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that did not end well."""

    error: CakeError
    usage: Usage | None = None


TextEvent = PromptProgress | PromptDone | TokenEvent | Embedding | Finished | Failed


@dataclass(frozen=True, slots=True)
class ImageStep:
    """Image `image` of the job finished step `step` of `steps`; `seconds` is what the step took."""

    image: int
    step: int
    steps: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ImagePreview:
    """An image as it stands after a step, encoded as PNG."""

    image: int
    step: int
    png: bytes


@dataclass(frozen=True, slots=True)
class ImageDone:
    """A finished image: 8-bit RGB rows, and the seed that makes it again."""

    image: int
    width: int
    height: int
    rgb: bytes
    seed: int


@dataclass(frozen=True, slots=True)
class ImageWarning:
    """Something the user should know, e.g. which part of a prompt was cut."""

    message: str


ImageEvent = ImageStep | ImagePreview | ImageDone | ImageWarning | Finished | Failed


@dataclass(frozen=True, slots=True)
class NodeEvent:
    """A node changed its state: `up`, `suspect`, `down`, `draining`."""

    node: str
    state: Literal["up", "suspect", "down", "draining"]
    address: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """A request was queued, started or ended, for observers: no text in it."""

    request: str
    state: Literal["queued", "started", "finished", "failed", "cancelled"]
    usage: Usage | None = None
    detail: str = ""


ClusterEvent = NodeEvent | RequestEvent
