"""Values inside the CBOR maps of the protocol: session specs and errors, each by a closed table; names of constants."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from cake_core import errors
from cake_core.errors import CakeError, ProtocolError
from cake_core.model import SessionSpec, Tensor
from cake_core.requests import SamplingParams


def spec_to_fields(spec: SessionSpec) -> dict[str, Any]:
    values = asdict(spec)
    sampling = values["sampling"]
    sampling["logit_bias"] = [list(pair) for pair in sampling["logit_bias"]]
    sampling["banned_until"] = list(sampling["banned_until"])
    return values


def spec_from_fields(values: Mapping[str, Any]) -> SessionSpec:
    """Raises ProtocolError for wrong types and RequestError for values out of range."""
    sampling = values.get("sampling")
    if not isinstance(sampling, dict):
        raise ProtocolError("a session without sampling parameters")
    try:
        bias = tuple((int(token), float(value)) for token, value in sampling.get("logit_bias", ()))
        banned = tuple(int(token) for token in sampling.get("banned_until", ()))
        plain = _typed(SamplingParams, {k: v for k, v in sampling.items() if k not in ("logit_bias", "banned_until")})
        params = SamplingParams(**plain, logit_bias=bias, banned_until=banned)
        rest = _typed(SessionSpec, {k: v for k, v in values.items() if k != "sampling"})
        return SessionSpec(sampling=params, **rest)
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"a damaged session spec: {error}") from error


_KINDS: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "str": str, "str | None": (str, type(None))}


def _typed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    known = {f.name: str(f.type) for f in fields(cls)}
    found = {}
    for name, value in values.items():
        if name in known:
            if not isinstance(value, _KINDS[known[name]]) or isinstance(value, bool):
                raise TypeError(f"{name} must be {known[name]}")
            found[name] = value
    return found


def error_fields(error: BaseException) -> dict[str, Any]:
    """How an error travels: the name of its class and its message; anything unexpected is only named."""
    if isinstance(error, CakeError):
        return {"kind": type(error).__name__, "message": str(error)}
    return {"kind": "StageError", "message": f"{type(error).__name__}: {error}"}


def error_from_fields(values: Mapping[str, Any]) -> CakeError:
    """The error a peer reported, by a closed table of names; an unknown one becomes a StageError."""
    kinds: dict[str, type[CakeError]] = {
        cls.__name__: cls
        for cls in (
            errors.StageError, errors.CapacityError, errors.RequestError, errors.NodeMismatch, errors.ProtocolError,
            errors.ConfigError, errors.UnsupportedModel, errors.CheckpointError, errors.Cancelled, errors.NodeLost,
            errors.RewindError, errors.NodeBusy, errors.NodeUnassigned,
        )
    }  # fmt: skip
    return kinds.get(str(values.get("kind")), errors.StageError)(str(values.get("message", "no reason given")))


def content_id(tensor: Tensor) -> bytes:
    """Names a tensor by what is in it."""
    digest = hashlib.blake2b(f"{tensor.dtype}{tensor.shape}".encode(), digest_size=16)
    digest.update(tensor.data)
    return digest.digest()
