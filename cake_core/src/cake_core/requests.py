"""What a caller asks for: frozen, checked values that the CLI, the server and Python callers all build."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cake_core.errors import RequestError

Message = Mapping[str, Any]
"""A chat message as OpenAI's API has it: role, content, and for tools `tool_calls` (arguments as a mapping), `tool_call_id`."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. Applied in this order: bias and penalties, temperature, top_k, top_p, min_p, one draw.

    Attributes:
        temperature: 0 takes the most likely token and ignores everything after it.
        top_k: keep the k most likely (0: all). top_p: keep the smallest set of most likely tokens whose probability
            reaches p. min_p: keep tokens at least this times as likely as the best.
        repeat_penalty: divides positive and multiplies negative logits of tokens among the last `repeat_last_n` of
            prompt and answer (0: none of them, -1: all). frequency_penalty, presence_penalty: subtracted for tokens of the
            answer, by count and once.
        logit_bias: (token id, value) pairs added to the logits.
        seed: with the choice and the position it decides every draw, whatever the placement.
        min_tokens: `banned_until` ids cannot be drawn before the answer has this many tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    min_tokens: int = 0
    banned_until: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, math.inf)
        _check("top_p", self.top_p, 0.0, 1.0)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check("presence_penalty", self.presence_penalty, -2.0, 2.0)
        if not (math.isfinite(self.repeat_penalty) and self.repeat_penalty > 0):
            raise RequestError(f"repeat_penalty must be above 0, not {self.repeat_penalty}", "repeat_penalty")
        if self.top_k < 0:
            raise RequestError(f"top_k must be 0 (off) or more, not {self.top_k}", "top_k")
        if self.repeat_last_n < -1:
            raise RequestError(f"repeat_last_n must be -1 (all), 0 (off) or more, not {self.repeat_last_n}", "repeat_last_n")
        if self.min_tokens < 0:
            raise RequestError(f"min_tokens must be 0 or more, not {self.min_tokens}", "min_tokens")
        if not 0 <= self.seed < 2**64:
            raise RequestError(f"seed must be between 0 and 2**64 - 1, not {self.seed}", "seed")

    @property
    def needs_history(self) -> bool:
        """Whether a draw depends on the tokens before it, or on a table of ids."""
        return bool(
            self.logit_bias
            or (self.banned_until and self.min_tokens)
            or (self.repeat_penalty != 1 and self.repeat_last_n)
            or self.frequency_penalty
            or self.presence_penalty
        )


def _check(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        bounds = f"{low:g} or more" if high == math.inf else f"between {low:g} and {high:g}"
        raise RequestError(f"{name} must be {bounds}, not {value}", name)


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a model's own generation_config says; None where it says nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None

    def fill(self, **asked: float | int | None) -> dict[str, Any]:
        """`asked` with its missing values taken from these defaults; what neither knows is left out."""
        names = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")
        own = {name: getattr(self, name) for name in names}
        merged = {**own, **{name: value for name, value in asked.items() if value is not None}}
        return {name: value for name, value in merged.items() if value is not None}


@dataclass(frozen=True, slots=True)
class TextRequest:
    """One generation, on token ids: the engine knows no text but what the detokenizer gives it.

    Attributes:
        prompt: ids, at least one.
        max_tokens: most tokens to generate; None for as many as the context allows; 0 scores the prompt only.
        stop: strings that end the answer and are not part of it.
        stop_ids: ids that end the answer; `ignore_eos` overrules them.
        logprobs: top alternatives to report with each token, None for no log-probabilities at all.
        score_prompt: report log-probabilities of the prompt's own tokens (with `logprobs` alternatives).
        embed: return the final hidden states of the prompt instead of generating.
        choice: index among the choices of one request; part of what seeds the draws.
        skip_special: leave special tokens out of the text.
        include_stop: keep the stop string in the text.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    score_prompt: bool = False
    embed: bool = False
    grammar: str | None = None
    choice: int = 0
    skip_special: bool = True
    include_stop: bool = False

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RequestError("the prompt has no tokens; give at least one", "prompt")
        if self.max_tokens is not None and self.max_tokens < 0:
            raise RequestError(f"max_tokens must be 0 or more, not {self.max_tokens}", "max_tokens")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise RequestError(f"logprobs must be between 0 and 20, not {self.logprobs}", "logprobs")
        if any(not text for text in self.stop):
            raise RequestError("a stop string must not be empty", "stop")

    def with_choice(self, choice: int) -> TextRequest:
        return replace(self, choice=choice)


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One image job: `images` pictures of one prompt, the k-th from seed `seed + k`.

    `width`, `height`, `steps`, `guidance`: None for the model's default. `init_image`: encoded bytes (PNG, JPEG, WebP) of
    the start image for img2img, with `mask` for inpainting. `preview_every`: decode an image each n steps (0: never).
    `extra`: the backend's own switches, checked by it.
    """

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    images: int = 1
    init_image: bytes | None = None
    mask: bytes | None = None
    strength: float = 0.8
    preview_every: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None and (value < 8 or value % 8):
                raise RequestError(f"{name} must be a positive multiple of 8, not {value}", name)
        if self.steps is not None and self.steps < 1:
            raise RequestError(f"steps must be at least 1, not {self.steps}", "steps")
        if self.images < 1:
            raise RequestError(f"images must be at least 1, not {self.images}", "images")
        if not 0.0 <= self.strength <= 1.0:
            raise RequestError(f"strength must be between 0 and 1, not {self.strength}", "strength")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise RequestError(f"guidance must be a number, not {self.guidance}", "guidance")
        if self.preview_every < 0:
            raise RequestError(f"preview_every must be 0 or more, not {self.preview_every}", "preview_every")
        if not 0 <= self.seed < 2**63:
            raise RequestError(f"seed must be between 0 and 2**63 - 1, not {self.seed}", "seed")


def chat(*pairs: tuple[str, str]) -> Sequence[Message]:
    """Messages from (role, content) pairs."""
    return [{"role": role, "content": content} for role, content in pairs]
