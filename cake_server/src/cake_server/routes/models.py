"""GET /v1/models, /health, /metrics, and cancelling by id."""

from __future__ import annotations

from typing import Any

from litestar import Response, delete, get, post
from litestar.params import FromPath

from cake_core.errors import Cancelled
from cake_core.model import ModelInfo
from cake_server.errors import ApiError, error_body
from cake_server.metrics import CONTENT_TYPE
from cake_server.routes.common import ERRORS, ServiceOf
from cake_server.schemas.models import Health, ModelArchitecture, ModelCard, ModelList, ModelMeta
from cake_server.service import Service


@get(["/v1/models", "/models"], responses=ERRORS)
async def list_models(service: ServiceOf) -> ModelList:
    """The model this server has, under each of its names."""
    runtime = service.check_ready()
    return ModelList([_card(service, runtime.info, name) for name in service.names])


@get(["/v1/models/{model_id:path}"], responses=ERRORS)
async def show_model(model_id: FromPath[str], service: ServiceOf) -> ModelCard:
    """One model; ids may contain slashes."""
    runtime = service.check_ready()
    name = model_id.removeprefix("/")  # Litestar hands over the slash before a path parameter
    service.check_model(name)
    return _card(service, runtime.info, name)


def _card(service: Service, info: ModelInfo, name: str) -> ModelCard:
    image = info.model_type == "image"
    return ModelCard(
        id=name,
        created=service.created,
        root=info.name,
        max_model_len=info.context_length,
        meta=ModelMeta(
            n_params=sum(layer.flops_per_token for layer in info.layers) // 2,
            n_ctx_train=info.context_length,
            n_vocab=info.vocab_size,
            size=sum(layer.nbytes for layer in info.layers),
        ),
        architecture=ModelArchitecture(["text", "image"] if image else ["text"], ["image"] if image else ["text"]),
    )


@get(["/health", "/v1/health"], responses={503: ERRORS[503]})
async def health(service: ServiceOf) -> Response[Health]:
    """200 when requests can be served; 503 while loading or when a node is missing, with its name. Needs no key."""
    status = service.status()
    if status["status"] == "ok":
        return Response(Health(status="ok", model=status["model"]))
    code = {"loading": "model_loading", "degraded": "cluster_degraded", "failed": "model_failed"}.get(
        status["status"], "shutting_down"
    )
    prefix = "Loading model: " if code == "model_loading" else ""
    body: Any = error_body(ApiError(503, prefix + status["detail"], code))
    return Response(body, status_code=503, headers={"retry-after": "2"})


@get("/metrics", media_type="text/plain", responses={401: ERRORS[401], 403: ERRORS[403]})
async def metrics(service: ServiceOf) -> Response[bytes]:
    """Prometheus text."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE)


@post("/v1/cancel/{response_id:str}", status_code=200, responses=ERRORS)
async def cancel(response_id: FromPath[str], service: ServiceOf) -> dict[str, Any]:
    """Ends the request whose response has this id (agents behind a proxy cannot just hang up)."""
    return _cancel(response_id, service)


@delete("/api/v1/requests/{response_id:str}", status_code=200, responses=ERRORS)
async def delete_request(response_id: FromPath[str], service: ServiceOf) -> dict[str, Any]:
    """As `POST /v1/cancel/{id}`."""
    return _cancel(response_id, service)


def _cancel(response_id: str, service: Service) -> dict[str, Any]:
    if not service.cancel(response_id, Cancelled("the request was cancelled")):
        raise ApiError(404, f"no request {response_id[:100]!r} is running", "request_not_found")
    return {"id": response_id, "object": "request", "cancelled": True}
