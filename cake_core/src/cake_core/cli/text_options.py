"""The options of one text generation, and the request they build."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from cake_core.cli.sections import option
from cake_core.errors import RequestError

if TYPE_CHECKING:
    from cake_core.model import Tokenizer
    from cake_core.requests import Message, SamplingDefaults, SamplingParams, TextRequest

TEXT = "Text"

FALLBACK = {"temperature": 0.7, "top_p": 0.9, "min_p": 0.05}
"""For models that come without a generation_config, as most GGUF files do: drawing from everything makes small ones ramble."""

_OPTIONS = (
    option(TEXT, "--max-tokens", type=int, metavar="N", help="Most tokens to generate.  [default: what the context allows]"),
    option(TEXT, "--temperature", type=float, metavar="X", help="0 takes the most likely token.  [default: the model's own]"),
    option(TEXT, "--top-k", type=int, metavar="N", help="Draw from the N most likely tokens; 0 for all."),
    option(TEXT, "--top-p", type=float, metavar="P", help="Draw from the most likely tokens that make up P."),
    option(TEXT, "--min-p", type=float, metavar="P", help="Leave out tokens less likely than P times the best."),
    option(TEXT, "--repeat-penalty", type=float, metavar="X", help="Makes repetition less likely; 1 is off."),
    option(TEXT, "--repeat-last-n", type=int, metavar="N", help="Tokens the penalty looks back; -1 for all."),
    option(TEXT, "--stop", multiple=True, metavar="TEXT", help="End the answer here; may be repeated."),
    option(TEXT, "--system-prompt", metavar="TEXT", help="What the model is told about its role."),
    option(TEXT, "--raw", is_flag=True, help="Continue the prompt as it is, without the model's chat template."),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TextFlags:
    """The values of these options, field for option; None for the model's own."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    stop: tuple[str, ...] = ()
    system_prompt: str | None = None
    raw: bool = False

    def check(self, seed: int) -> None:
        """Raises RequestError for values out of range: before a model is loaded, not after."""
        from cake_core.requests import SamplingDefaults, TextRequest

        TextRequest((0,), self._sampling(SamplingDefaults(), seed), self.max_tokens, self.stop)

    def messages(self, prompt: str) -> list[Message]:
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        return [*system, {"role": "user", "content": prompt}]

    def chat_request(self, tokenizer: Tokenizer, messages: Sequence[Message], seed: int) -> TextRequest:
        """The request that continues a conversation by the model's chat template."""
        prompt = tokenizer.encode(tokenizer.render_chat(messages), add_special=False)
        return self._request(tokenizer, prompt, seed)

    def raw_request(self, tokenizer: Tokenizer, prompt: str, seed: int) -> TextRequest:
        """The request that continues `prompt` as it is."""
        if self.system_prompt is not None:
            raise RequestError("--system-prompt needs a chat template; leave it out or leave out --raw", "system_prompt")
        return self._request(tokenizer, tokenizer.encode(prompt), seed)

    def _request(self, tokenizer: Tokenizer, prompt: Sequence[int], seed: int) -> TextRequest:
        from cake_core.requests import TextRequest

        return TextRequest(
            prompt=tuple(prompt),
            sampling=self._sampling(tokenizer.defaults, seed),
            max_tokens=self.max_tokens,
            stop=self.stop,
            stop_ids=tokenizer.stop_ids,
        )

    def _sampling(self, defaults: SamplingDefaults, seed: int) -> SamplingParams:
        from cake_core.requests import SamplingParams

        chosen = defaults.fill(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repeat_penalty=self.repeat_penalty,
        )
        if not defaults.fill():
            chosen = {**FALLBACK, **chosen}
        if self.repeat_last_n is not None:
            chosen["repeat_last_n"] = self.repeat_last_n
        return SamplingParams(seed=seed, **chosen)


def text_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command, which gets them as the one argument `text`."""
    names = {f.name for f in fields(TextFlags)}

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        values = {name: kwargs.pop(name) for name in names}
        return function(*args, text=TextFlags(**values), **kwargs)

    result: Callable[..., Any] = wrapper
    for add in reversed(_OPTIONS):
        result = add(result)
    return result
