"""Prompts on their way to the text encoders: prompts longer than these take, and a record of what came back."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from cake_core.errors import RequestError
from cake_sd.inputs import chunks
from cake_sd.lane import Record

_PROMPTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")


def hook_encoding(pipeline: Any, long_prompts: bool, record: Record | None) -> None:
    """Makes the pipeline encode long prompts in chunks, and write down what its text encoders gave."""
    original = pipeline.encode_prompt

    @functools.wraps(original)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        encoded = _in_chunks(pipeline, original, args, kwargs) if long_prompts else original(*args, **kwargs)
        if record is not None:
            record.encoded.append(list(encoded))
        return encoded

    pipeline.encode_prompt = encode_prompt


def _in_chunks(pipeline: Any, original: Any, args: Any, kwargs: Any) -> Any:
    """Encodes each chunk as a prompt of its own and joins the sequences; pooled embeddings are those of the first chunk."""
    bound = inspect.signature(original).bind(*args, **kwargs).arguments
    if getattr(pipeline, "text_encoder", None) is None or "Flux" in type(pipeline).__name__ or "prompt_3" in bound:
        raise RequestError(
            f"long prompts are not for {type(pipeline).__name__}, whose T5 takes long ones anyway", "long_prompts"
        )
    pieces = {name: chunks(pipeline.tokenizer, text) for name in _PROMPTS if isinstance(text := bound.get(name), str)}
    count = max((len(found) for found in pieces.values()), default=1)
    if count == 1:
        return original(*args, **kwargs)
    encoded = []
    for index in range(count):
        part = {name: found[index] if index < len(found) else "" for name, found in pieces.items()}
        if bound.get("negative_prompt") is None:
            part["negative_prompt"] = ""
        encoded.append(original(**{**bound, **part}))
    return tuple(_join(values) for values in zip(*encoded, strict=True))


def _join(values: tuple[Any, ...]) -> Any:
    first = values[0]
    return torch.cat(values, dim=1) if isinstance(first, torch.Tensor) and first.ndim == 3 else first
