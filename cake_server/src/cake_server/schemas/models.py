"""GET /v1/models, /health and the cluster."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType, field


class ModelMeta(Struct):
    n_params: int
    n_ctx_train: int
    n_vocab: int
    size: int


class ModelArchitecture(Struct):
    input_modalities: list[str]
    output_modalities: list[str]


class ModelCard(Struct, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "cake"
    root: str
    max_model_len: int
    meta: ModelMeta
    architecture: ModelArchitecture


class ModelList(Struct):
    data: list[ModelCard]
    object: str = "list"


class Health(Struct, kw_only=True):
    status: str
    model: str | UnsetType = UNSET


class NodeBody(Struct, kw_only=True):
    """A node with its share of the model. `state` is up, connecting, draining or down; `since` a Unix time."""

    name: str
    address: str
    state: str
    layers: list[str]
    nbytes: int
    since: float = 0.0
    error: str = ""
    memory: list[dict[str, Any]] = field(default_factory=list)
    platform: dict[str, Any] = field(default_factory=dict)
    traffic: dict[str, Any] = field(default_factory=dict)


class SpanBody(Struct):
    """Contiguous layers on one node: a piece of the strip."""

    nodes: list[str]
    layers: str
    nbytes: int


class EngineBody(Struct, kw_only=True):
    running: int = 0
    waiting: int = 0
    kv_tokens: int = 0
    kv_tokens_used: int = 0


class ClusterBody(Struct, kw_only=True):
    status: str
    detail: str = ""
    version: str
    model: str = ""
    model_type: str = ""
    architecture: str = ""
    dtype: str = ""
    context_length: int = 0
    nodes: list[NodeBody] = field(default_factory=list)
    spans: list[SpanBody] = field(default_factory=list)
    engine: EngineBody = field(default_factory=EngineBody)
    loading: dict[str, list[int]] = field(default_factory=dict)
    requests: int = 0
