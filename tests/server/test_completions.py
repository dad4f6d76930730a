"""Text completions: prompts in every form, echo, and log-probabilities as evaluators read them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from cake_core.events import TokenLogprob
from cake_core.requests import SamplingParams, TextRequest
from cake_core.runtime import TextRuntime
from cake_server.text.logprobs import CompletionScores, clamp, token_text

PATH = "/v1/completions"
BLOCK = 16
"""The most that a shared beginning may be computed again: a block of the toy's."""


def test_prompts_come_in_four_forms(api: httpx.Client, runtime: TextRuntime) -> None:
    ids = runtime.tokenizer.encode("hi there")
    answers = []
    for prompt in ("hi there", ["hi there"], ids, [ids]):
        body = api.post(PATH, json={"prompt": prompt, "seed": 5}).raise_for_status().json()
        assert body["object"] == "text_completion"
        assert body["usage"]["completion_tokens"] <= 16
        answers.append(body["choices"][0]["text"])
    assert len(set(answers)) == 1


def test_choices_are_ordered_by_prompt_then_choice(api: httpx.Client) -> None:
    single = [api.post(PATH, json={"prompt": text, "seed": 5, "max_tokens": 6, "n": 2}).json() for text in ("one", "two")]
    both = api.post(PATH, json={"prompt": ["one", "two"], "seed": 5, "max_tokens": 6, "n": 2}).json()
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in both["choices"]] == [c["text"] for body in single for c in body["choices"]]
    assert both["usage"]["prompt_tokens"] == sum(body["usage"]["prompt_tokens"] for body in single)


def test_scoring_is_what_lm_eval_reads(api: httpx.Client, runtime: TextRuntime) -> None:
    """Its request, word for word, and its arithmetic: the context's own scores are cut off, greedy is float equality."""
    prompts = [runtime.tokenizer.encode("the sky is blue"), runtime.tokenizer.encode("abc")]
    request = {"prompt": prompts, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234, "model": "toy"}
    choices = api.post(PATH, json=request).raise_for_status().json()["choices"]
    for choice, ids in zip(sorted(choices, key=lambda c: c["index"]), prompts, strict=True):
        scores = choice["logprobs"]
        lengths = {name: len(scores[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
        assert set(lengths.values()) <= {len(ids), len(ids) + 1}
        assert scores["token_logprobs"][0] is None
        assert scores["top_logprobs"][0] is None
        for token, logprob, top in list(zip(scores["tokens"], scores["token_logprobs"], scores["top_logprobs"], strict=True))[
            1:
        ]:
            assert top[token] == logprob
            assert max(top.values()) >= logprob
        text = runtime.tokenizer.decode(ids, skip_special=False)
        assert choice["text"].startswith(text)
        for token, offset in zip(scores["tokens"], scores["text_offset"], strict=True):
            assert choice["text"][offset : offset + len(token)] == token


def test_prompt_scores_are_the_engines(api: httpx.Client, runtime: TextRuntime) -> None:
    ids = tuple(runtime.tokenizer.encode("score me"))
    request = TextRequest(ids, SamplingParams(temperature=0), max_tokens=0, logprobs=0, score_prompt=True)
    done = next(event for event in runtime.engine.generate(request) if getattr(event, "scores", None))
    wanted = [None if score is None else score.logprob for score in done.scores]  # type: ignore[union-attr]
    body = {"prompt": list(ids), "max_tokens": 0, "logprobs": 0, "echo": True}
    choice = api.post(PATH, json=body).raise_for_status().json()["choices"][0]
    assert choice["logprobs"]["token_logprobs"] == wanted
    assert choice["text"] == "<|begin|>score me"


def test_a_shared_beginning_is_not_computed_again(api: httpx.Client) -> None:
    """Told in the usage of the answer and of its stream, and counted in the metrics."""

    def hits() -> float:
        line = next(x for x in api.get("/metrics").text.splitlines() if x.startswith("cake_prefix_cache_hits_total "))
        return float(line.split()[1])

    beginning = "A beginning that only this test has, long enough for some blocks. " * 3
    first = api.post(PATH, json={"prompt": beginning + "one", "max_tokens": 2, "seed": 1}).json()
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    before = hits()
    asked = {"prompt": beginning + "two", "max_tokens": 2, "seed": 1}
    cached = api.post(PATH, json=asked).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert len(beginning) - BLOCK <= cached <= len(beginning) + 1, "characters are the toy's tokens"
    assert hits() - before == cached
    stream = api.post(PATH, json={**asked, "stream": True, "stream_options": {"include_usage": True}}).text
    last = json.loads(stream.split("data: ")[-2])
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] >= cached


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_adds_up_to_the_whole(api: httpx.Client, echo: bool) -> None:
    request: dict[str, Any] = {"prompt": ["one", "two"], "seed": 5, "max_tokens": 8, "logprobs": 2, "echo": echo}
    whole = api.post(PATH, json=request).json()
    response = api.post(PATH, json={**request, "stream": True, "stream_options": {"include_usage": True}})
    data = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    chunks = [json.loads(line) for line in data[:-1]]
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [x for part in parts if part["logprobs"] for x in part["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]
        assert [x for part in parts if part["logprobs"] for x in part["logprobs"]["text_offset"]] == choice["logprobs"][
            "text_offset"
        ]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
    assert chunks[-1]["usage"] == whole["usage"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": [10**7]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": "x", "logprobs": 99}, "logprobs"),
        ({"prompt": ["x"] * 600}, "n"),
    ],
)
def test_wrong_prompts_are_named(api: httpx.Client, change: dict[str, Any], param: str) -> None:
    response = api.post(PATH, json=change)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


class _Bytes:
    """Tokens 0 and 1 are halves of one character."""

    def token_bytes(self, token: int) -> bytes:
        return (b"\xc3", b"\xa9", b"a")[token]


def test_half_a_character_has_a_name_of_its_own() -> None:
    tokenizer: Any = _Bytes()
    assert [token_text(tokenizer, token) for token in (0, 1, 2)] == ["bytes:\\xc3", "bytes:\\xa9", "a"]
    shape = CompletionScores(tokenizer).prompt([0, 2], [None, TokenLogprob(2, -1.5, ((0, -0.5), (2, -1.5)))])
    assert shape.top_logprobs == [None, {"a": -1.5, "bytes:\\xc3": -0.5}]


def test_numbers_json_does_not_have_are_clamped() -> None:
    assert clamp(float("-inf")) == -9999.0
    assert clamp(float("nan")) == -9999.0
    assert clamp(-0.25) == -0.25
