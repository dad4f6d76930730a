"""Request fields to `TextRequest`s. What is known and cannot be honoured is refused by name, never dropped."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cake_core.errors import RequestError
from cake_core.model import Tokenizer
from cake_core.requests import SamplingDefaults, SamplingParams, TextRequest
from cake_core.runtime import TextRuntime
from cake_server.errors import ApiError, unsupported
from cake_server.schemas.common import SamplingFields
from cake_server.settings import Settings

MAX_CHOICES = 8
MAX_STOPS = 16

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "best_of": (0, 1),
    "use_beam_search": (False,),
    "suffix": ("",),
    "typical_p": (0, 1),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "bad_words": ([],),
    "logits_processors": ([],),
    "modalities": ([], ["text"]),
    "audio": ({},),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "allowed_token_ids": ([],),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "tfs_z": (1,),
    "top_a": (0,),
    "samplers": ([], ""),
    "t_max_predict_ms": (0, -1),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
"""Fields that would change the answer if we honoured them, with the values under which they would not."""

_INSTEAD = {
    "function": "; use tools and tool_choice",
    "guided_": "; use structured_outputs",
    "prompt_logprobs": "; use /v1/completions with echo and logprobs",
}


def refuse_unsupported(body: SamplingFields) -> None:
    for name, neutral in UNSUPPORTED.items():
        value = getattr(body, name, None)
        if value is not None and value not in neutral:
            instead = next((hint for start, hint in _INSTEAD.items() if name.startswith(start)), "")
            raise unsupported(name, f"{name} is not supported by this server, and would change the answer{instead}")


@dataclass(frozen=True, slots=True)
class Plan:
    """What the requests of one HTTP request share beside their prompt."""

    max_tokens: int | None
    logprobs: int | None = None
    grammar: str | None = None
    score_prompt: bool = False
    show_special: bool = False


def choices(body: SamplingFields) -> int:
    count = 1 if body.n is None else body.n
    if not 1 <= count <= MAX_CHOICES:
        raise RequestError(f"n must be between 1 and {MAX_CHOICES}, not {count}", "n")
    return count


def text_requests(
    body: SamplingFields, prompts: Sequence[Sequence[int]], runtime: TextRuntime, settings: Settings, plan: Plan
) -> list[TextRequest]:
    """One request an answer: all choices of the first prompt, then of the second."""
    refuse_unsupported(body)
    count, stops = choices(body), stop_strings(body.stop)
    sampling = sampling_params(body, runtime.tokenizer, settings)
    stop_ids = runtime.tokenizer.stop_ids | frozenset(_ids(body.stop_token_ids, runtime.info.vocab_size, "stop_token_ids"))
    max_tokens = settings.max_tokens if plan.max_tokens is None else plan.max_tokens
    if sampling.min_tokens and plan.max_tokens is not None and sampling.min_tokens > plan.max_tokens:
        raise RequestError(f"min_tokens is {sampling.min_tokens}, more than the {plan.max_tokens} of max_tokens", "min_tokens")
    result = []
    for prompt in prompts:
        check_context(len(prompt), runtime.info.context_length, "messages" if hasattr(body, "messages") else "prompt")
        request = TextRequest(
            prompt=tuple(prompt),
            sampling=sampling,
            max_tokens=max_tokens,
            stop=stops,
            stop_ids=stop_ids,
            ignore_eos=bool(body.ignore_eos),
            logprobs=plan.logprobs,
            score_prompt=plan.score_prompt,
            grammar=plan.grammar,
            skip_special=body.skip_special_tokens is not False and not plan.show_special,
            include_stop=bool(body.include_stop_str_in_output),
        )
        result += [request.with_choice(choice) if choice else request for choice in range(count)]
    return result


def sampling_params(body: SamplingFields, tokenizer: Tokenizer, settings: Settings) -> SamplingParams:
    """What was asked, else what the operator set, else what the model's generation_config says, else 1.0."""
    own = settings.sampling.fill()
    asked = SamplingDefaults(**{**tokenizer.defaults.fill(), **own}).fill(
        temperature=body.temperature,
        top_k=None if body.top_k is None else max(body.top_k, 0),  # -1 is how vLLM's clients say "off"
        top_p=body.top_p,
        min_p=body.min_p,
        repeat_penalty=body.repeat_penalty if body.repeat_penalty is not None else body.repetition_penalty,
    )
    if asked.get("temperature", 0) > 100:
        raise RequestError(f"temperature must be between 0 and 100, not {asked['temperature']}", "temperature")
    last_n = body.repeat_last_n if body.repeat_last_n is not None else settings.repeat_last_n
    if last_n is not None:
        asked["repeat_last_n"] = last_n
    min_tokens = body.min_tokens or 0
    return SamplingParams(
        **asked,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=_bias(body.logit_bias, tokenizer.vocab_size),
        seed=_seed(body.seed, settings.seed),
        min_tokens=min_tokens,
        banned_until=tuple(sorted(tokenizer.stop_ids | frozenset(body.stop_token_ids or ()))) if min_tokens > 0 else (),
    )


def _seed(asked: int | None, default: int | None) -> int:
    seed = default if asked is None or asked == -1 else asked
    if seed is None:
        return secrets.randbits(63)
    if not -(2**63) <= seed < 2**64:
        raise RequestError("seed must fit 64 bits", "seed")
    return seed % 2**64


def _bias(bias: Mapping[str, float] | None, vocab_size: int) -> tuple[tuple[int, float], ...]:
    result = []
    for key, value in (bias or {}).items():
        if not (key.isascii() and key.isdigit()) or int(key[:12]) >= vocab_size:
            raise RequestError(
                f"logit_bias: {key[:40]!r} is not a token id of this model (0 to {vocab_size - 1})", "logit_bias"
            )
        if not -100 <= value <= 100:
            raise RequestError(f"logit_bias: values are between -100 and 100, not {value}", "logit_bias")
        result.append((int(key), value))
    return tuple(result)


def _ids(ids: Sequence[int] | None, vocab_size: int, param: str) -> Sequence[int]:
    for token in ids or ():
        if not 0 <= token < vocab_size:
            raise RequestError(f"{param}: {token} is not a token id of this model (0 to {vocab_size - 1})", param)
    return ids or ()


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None or stop == "":
        return ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise RequestError(f"at most {MAX_STOPS} stop strings, not {len(stops)}", "stop")
    if any(len(text) > 1000 for text in stops):
        raise RequestError("a stop string may have at most 1000 characters", "stop")
    return stops


def check_ids(ids: Sequence[int], vocab_size: int, param: str = "prompt") -> tuple[int, ...]:
    return tuple(_ids(ids, vocab_size, param))


def check_context(prompt: int, context: int, param: str) -> None:
    """The engine checks this too; here the answer carries the numbers that agents look for."""
    if context and prompt > context:
        raise ApiError(
            400,
            f"This model's maximum context length is {context} tokens. However, your prompt has {prompt} tokens; shorten it.",
            "context_length_exceeded",
            param,
            extra={"n_prompt_tokens": prompt, "n_ctx": context},
        )
