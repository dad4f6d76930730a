"""langchain-openai: chat, streams, embeddings (packed as base64, with its own token counting off)."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("default")]
langchain_openai: Any = pytest.importorskip("langchain_openai", reason="needs langchain-openai")


@pytest.fixture
def options(base_url: str, model: str) -> dict[str, Any]:
    return {"base_url": base_url, "api_key": "none", "model": model, "max_retries": 0}


def test_chat_and_stream_agree(options: dict[str, Any]) -> None:
    chat = langchain_openai.ChatOpenAI(max_tokens=8, seed=3, **options)
    whole = chat.invoke("hi")
    assert whole.usage_metadata["output_tokens"] <= 8
    assert "".join(chunk.content for chunk in chat.stream("hi")) == whole.content


def test_embeddings(options: dict[str, Any]) -> None:
    embeddings = langchain_openai.OpenAIEmbeddings(check_embedding_ctx_length=False, **options)
    first, second = embeddings.embed_documents(["one", "two"])
    assert len(first) == len(second) > 0
    assert embeddings.embed_query("two") == pytest.approx(second, abs=1e-6)
