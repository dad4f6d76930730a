"""What is asked of the planner, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cake_core.errors import ConfigError
from cake_core.placement import Placement
from cake_core.topology import Topology, compress

Objective = Literal["latency", "throughput"]
OBJECTIVES: tuple[Objective, ...] = ("latency", "throughput")


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What to plan for.

    Attributes:
        context: positions of KV cache for each of `streams` sequences that must fit; 0 for all that the model can do.
        streams: sequences at once.
        objective: the least time a token of one sequence, or the most tokens a second with every stage busy.
        topology: the fixed part: a node with layers keeps them, one without is filled as any other.
        prompt: positions of the prompt whose time to first token is predicted. chunk: how many of them go in one batch.
        position: positions in the cache when the predicted token is made; None for the middle of the context, 4,096 at most.
        chain: a worker hands its output to the next instead of answering the master.
    """

    context: int = 0
    streams: int = 1
    objective: Objective = "latency"
    topology: Topology = field(default_factory=Topology)
    prompt: int = 512
    chunk: int = 512
    position: int | None = None
    chain: bool = False

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"cannot plan for {self.objective!r}; plan for {' or '.join(OBJECTIVES)}")
        if min(self.context, self.position or 0) < 0 or min(self.streams, self.prompt, self.chunk) < 1:
            raise ConfigError("context, streams and prompt of a plan must be positive")


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """Contiguous layers on one device. `room`: bytes that weights and KV cache may take there. `seconds`: a decode step."""

    node: str
    device: str
    layers: tuple[str, ...]
    weights: int
    kv: int
    room: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds a token of one sequence alone; tokens a second when every stage is busy; seconds to the first token of the
    asked prompt (None where a device's arithmetic is not known)."""

    seconds_per_token: float
    tokens_per_second: float
    seconds_to_first: float | None

    def as_fields(self) -> dict[str, Any]:
        return {
            "seconds_per_token": self.seconds_per_token,
            "tokens_per_second": self.tokens_per_second,
            "seconds_to_first": self.seconds_to_first,
        }


@dataclass(frozen=True, slots=True)
class Alone:
    """The best that one machine would do that holds every layer."""

    node: str
    prediction: Prediction


@dataclass(frozen=True, slots=True)
class Plan:
    """Which node serves which layers, and what that will do.

    Attributes:
        topology: the same as a topology to use or to write; only nodes that serve something.
        stages: device by device, in order of execution; several of one node in a row are one span of the placement.
        left_out: nodes that serve nothing, each with the reason.
        alone: the best single machine, None where none has room for the model.
        kv_tokens: positions of KV cache that every stage was given room for.
        advice: sentences for people, such as that one machine alone would be faster.
    """

    placement: Placement
    topology: Topology
    stages: tuple[PlannedStage, ...]
    prediction: Prediction
    left_out: Mapping[str, str] = field(default_factory=dict)
    alone: Alone | None = None
    kv_tokens: int = 0
    advice: tuple[str, ...] = ()

    def as_fields(self) -> dict[str, Any]:
        stages = [
            {
                "node": s.node, "device": s.device, "layers": compress(s.layers), "weights": s.weights, "kv": s.kv,
                "room": s.room, "seconds": s.seconds,
            }
            for s in self.stages
        ]  # fmt: skip
        alone = None if self.alone is None else {"node": self.alone.node, **self.alone.prediction.as_fields()}
        return {
            "stages": stages,
            "prediction": self.prediction.as_fields(),
            "left_out": dict(self.left_out),
            "alone": alone,
            "kv_tokens": self.kv_tokens,
            "advice": list(self.advice),
        }
