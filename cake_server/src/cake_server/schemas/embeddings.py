"""POST /v1/embeddings."""

from __future__ import annotations

from msgspec import Struct


class EmbeddingRequest(Struct, kw_only=True):
    """`input`: a text, a list of texts, a list of token ids, or a list of such lists. `pooling`: last (default) or mean."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    pooling: str | None = None
    user: str | None = None


class EmbeddingItem(Struct, kw_only=True):
    object: str = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct, kw_only=True):
    object: str = "list"
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage
