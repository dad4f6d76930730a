"""What a master expects a node to serve, and how it compares what the node says with that."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cake_core.errors import NodeMismatch


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a node must serve: its stages by the placement, the model's identity, and a fingerprint for each layer whose
    tensors the master has too. `keep`: seconds for which it is to keep our sessions, should the link fall."""

    model_type: str
    stages: tuple[tuple[str, ...], ...]
    identity: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    keep: float = 0.0

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(layer for stage in self.stages for layer in stage)

    def attach_fields(self, token: bytes, live: Sequence[tuple[int, int]] = ()) -> dict[str, Any]:
        """What an ATTACH says. Sessions that are kept are found again by the token; `live` are those still wanted, by stage."""
        stages = [list(stage) for stage in self.stages]
        sessions = [[session for at, session in live if at == stage] for stage in range(len(stages))]
        return {"model_type": self.model_type, "stages": stages, "token": token, "keep": self.keep, "live": sessions}

    def check(self, report: Mapping[str, Any], name: str, address: str) -> None:
        """Compares an ATTACHED. Raises NodeMismatch, with the remedy, for another model or other weights."""
        for key, value in self.identity.items():
            if _plain(report["identity"].get(key)) != _plain(value):
                raise NodeMismatch(
                    f"{name} at {address} serves another model: its {key} is {report['identity'].get(key)!r}, "
                    f"the master's is {value!r}; start both with the same --model",
                    name,
                    address,
                )
        for layer, fingerprint in self.fingerprints.items():
            if report["fingerprints"].get(layer) != fingerprint:
                raise NodeMismatch(
                    f"{name} at {address} holds other weights for {layer} than the master; "
                    "copy the same checkpoint (or its bundle) there",
                    name,
                    address,
                )


def _plain(value: Any) -> str:
    """A value as it compares after crossing the wire, where tuples are lists."""
    return json.dumps(value, sort_keys=True, default=str)
