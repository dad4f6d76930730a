"""Requests are checked where they are made, and name the offending parameter."""

from __future__ import annotations

import math

import pytest

from cake_core.errors import RequestError
from cake_core.requests import ImageRequest, SamplingDefaults, SamplingParams, TextRequest, chat

BAD = [
    (SamplingParams, {"temperature": -0.1}, "temperature"),
    (SamplingParams, {"temperature": math.nan}, "temperature"),
    (SamplingParams, {"temperature": math.inf}, "temperature"),
    (SamplingParams, {"top_p": 1.1}, "top_p"),
    (SamplingParams, {"min_p": -0.1}, "min_p"),
    (SamplingParams, {"top_k": -1}, "top_k"),
    (SamplingParams, {"repeat_penalty": 0}, "repeat_penalty"),
    (SamplingParams, {"repeat_last_n": -2}, "repeat_last_n"),
    (SamplingParams, {"frequency_penalty": 2.1}, "frequency_penalty"),
    (SamplingParams, {"presence_penalty": -2.1}, "presence_penalty"),
    (SamplingParams, {"min_tokens": -1}, "min_tokens"),
    (SamplingParams, {"seed": -1}, "seed"),
    (SamplingParams, {"seed": 2**64}, "seed"),
    (TextRequest, {"prompt": ()}, "prompt"),
    (TextRequest, {"prompt": (1,), "max_tokens": -1}, "max_tokens"),
    (TextRequest, {"prompt": (1,), "logprobs": 21}, "logprobs"),
    (TextRequest, {"prompt": (1,), "stop": ("a", "")}, "stop"),
    (ImageRequest, {"prompt": "", "width": 63}, "width"),
    (ImageRequest, {"prompt": "", "height": 0}, "height"),
    (ImageRequest, {"prompt": "", "steps": 0}, "steps"),
    (ImageRequest, {"prompt": "", "images": 0}, "images"),
    (ImageRequest, {"prompt": "", "strength": 1.5}, "strength"),
    (ImageRequest, {"prompt": "", "guidance": math.nan}, "guidance"),
    (ImageRequest, {"prompt": "", "preview_every": -1}, "preview_every"),
    (ImageRequest, {"prompt": "", "seed": 2**63}, "seed"),
]


@pytest.mark.parametrize(("kind", "values", "param"), BAD, ids=[f"{k.__name__}-{v}" for k, v, _ in BAD])
def test_bad_values_are_named(kind, values, param):
    with pytest.raises(RequestError) as info:
        kind(**values)
    assert info.value.param == param
    assert str(info.value)
    assert info.value.exit_code == 2


def test_the_limits_themselves_are_allowed():
    SamplingParams(temperature=0, top_p=0, min_p=1, frequency_penalty=-2, presence_penalty=2, repeat_last_n=-1, seed=2**64 - 1)
    TextRequest((1,), max_tokens=0, logprobs=20)
    ImageRequest("", width=8, height=8, steps=1, strength=0, seed=2**63 - 1)


def test_defaults_fill_what_was_not_asked():
    defaults = SamplingDefaults(temperature=0.6, top_k=20)
    assert defaults.fill(temperature=None, top_p=0.5) == {"temperature": 0.6, "top_k": 20, "top_p": 0.5}
    assert defaults.fill(temperature=0.0, top_k=None) == {"temperature": 0.0, "top_k": 20}
    assert SamplingDefaults().fill() == {}


def test_choices_differ_in_their_choice_only():
    request = TextRequest((1, 2), max_tokens=3)
    assert request.with_choice(2) == TextRequest((1, 2), max_tokens=3, choice=2)


def test_chat_makes_messages():
    assert chat(("user", "Hi")) == [{"role": "user", "content": "Hi"}]
