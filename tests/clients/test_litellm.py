"""litellm as people call it: `openai/NAME` with an api_base."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("default")]
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it fetches a list of prices when imported
litellm: Any = pytest.importorskip("litellm", reason="needs litellm")

HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture
def options(base_url: str, model: str) -> dict[str, Any]:
    return {"model": f"openai/{model}", "api_base": base_url, "api_key": "none", "num_retries": 0}


def test_chat(options: dict[str, Any]) -> None:
    answer = litellm.completion(messages=HELLO, max_tokens=8, **options)
    assert answer.usage.completion_tokens <= 8
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_stream(options: dict[str, Any]) -> None:
    whole = litellm.completion(messages=HELLO, max_tokens=8, seed=3, **options).choices[0].message.content
    chunks = litellm.completion(messages=HELLO, max_tokens=8, seed=3, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_embeddings(options: dict[str, Any]) -> None:
    answer = litellm.embedding(input=["one", "two"], **options)
    assert len(answer.data) == 2


def test_errors(options: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(messages=HELLO, top_p=5, **options)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=HELLO, **{**options, "model": "openai/nothing"})
