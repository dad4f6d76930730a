"""Measures text generation through `Engine.submit`: scheduling, sampling and detokenising are inside."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

from cake_core.engine.text import EngineStats
from cake_core.errors import CakeError
from cake_core.events import Failed, Finished, TextEvent, TokenEvent
from cake_core.model import ModelInfo
from cake_core.requests import SamplingParams, TextRequest
from cake_core.runtime import TextRuntime
from cake_core.topology import MASTER, compress


@dataclass(frozen=True, slots=True)
class Load:
    """What to measure: `concurrency` requests at once, each of `prompt_tokens` random ids, `tokens` answered, stop ids off."""

    prompt_tokens: int = 512
    tokens: int = 128
    concurrency: int = 1
    runs: int = 5
    temperature: float = 0.0


@dataclass(slots=True)
class _Stream:
    """One request's times, in seconds."""

    began: float
    times: list[float] = field(default_factory=list)
    error: CakeError | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def sink(self, events: Sequence[TextEvent]) -> None:
        now = time.perf_counter()
        for event in events:
            if isinstance(event, TokenEvent):
                self.times.append(now)
            elif isinstance(event, Finished | Failed):
                self.error = event.error if isinstance(event, Failed) else None
                self.ended.set()


def bench_text(runtime: TextRuntime, load: Load) -> dict[str, Any]:
    """Medians over `runs`, after one run to warm up. Seconds, bytes, tokens; see `cake bench text --help`."""
    _run(runtime, load, salt=0)
    before, worked, earlier, began = _traffic(runtime), _work(runtime), runtime.engine.stats(), time.perf_counter()
    streams = [_run(runtime, load, salt) for salt in range(1, load.runs + 1)]
    wall, after, working, stats = time.perf_counter() - began, _traffic(runtime), _work(runtime), runtime.engine.stats()
    first = [s.times[0] - s.began for run in streams for s in run]
    gaps = [b - a for run in streams for s in run for a, b in zip(s.times, s.times[1:], strict=False)]
    rates = [_rate(run) for run in streams]
    generated = load.runs * load.concurrency * load.tokens
    return {
        "model": runtime.info.name,
        "dtype": runtime.info.dtype,
        "prompt_tokens": load.prompt_tokens,
        "tokens": load.tokens,
        "concurrency": load.concurrency,
        "runs": load.runs,
        "time_to_first_token": _spread(first),
        "time_per_token": _spread(gaps),
        "tokens_per_second": {"median": median(rates), "min": min(rates), "max": max(rates)},
        "prompt_tokens_per_second": load.prompt_tokens * load.concurrency / median(first),
        "wall_seconds": wall,
        "wire_bytes_per_token": {node: (after[node] - before[node]) / generated for node in after},
        "stages": _stages(worked, working, wall, generated),
        "legs": _legs(earlier, stats, worked, working, generated),
        "guesses": _guesses(earlier, stats),
    }


_Work = dict[tuple[str, str], tuple[int, float]]
"""Batches and seconds of each stage, by its node and layers."""


def _work(runtime: TextRuntime) -> _Work:
    parts = runtime.parts(fresh=True)
    return {(span.node, ", ".join(compress(span.layers))): (work.batches, work.seconds) for span, work, _ in parts}


def _stages(before: _Work, after: _Work, wall: float, generated: int) -> list[dict[str, Any]]:
    """Of each stage its seconds a batch and a generated token, and the share of all time that it had nothing to compute. Work
    is always queued here, so that share is what the wires, the engine and the other stages kept it waiting."""
    found = []
    for (node, layers), (batches, seconds) in after.items():
        earlier = before.get((node, layers), (0, 0.0))
        busy, count = seconds - earlier[1], batches - earlier[0]
        found.append(
            {
                "node": node,
                "layers": layers,
                "seconds_per_batch": busy / count if count else 0.0,
                "seconds_per_token": busy / generated,
                "idle": max(0.0, 1 - busy / wall),
            }
        )
    return found


def _legs(before: EngineStats, after: EngineStats, worked: _Work, working: _Work, generated: int) -> list[dict[str, Any]]:
    """Of each way to workers and back the seconds a generated token, and what of them no stage computed: the wires, and with
    more batches under way than stages the waiting for others."""
    found = []
    for places, seconds in after.legs.items():
        stages = [(node, ", ".join(compress(layers))) for node, layers in places]
        if all(node == MASTER for node, _ in stages):
            continue
        away = seconds - before.legs.get(places, 0.0)
        busy = sum(working[stage][1] - worked.get(stage, (0, 0.0))[1] for stage in stages)
        found.append(
            {
                "way": " -> ".join(node for node, _ in stages),
                "seconds_per_token": away / generated,
                "wire_seconds_per_token": max(0.0, away - busy) / generated,
            }
        )
    return found


def _guesses(before: EngineStats, after: EngineStats) -> dict[str, int]:
    return {"proposed": after.proposed - before.proposed, "accepted": after.accepted - before.accepted}


def _run(runtime: TextRuntime, load: Load, salt: int) -> list[_Stream]:
    streams = []
    for index in range(load.concurrency):
        prompt = _prompt(runtime.info, load.prompt_tokens, salt * 7919 + index)
        sampling = SamplingParams(temperature=load.temperature, seed=salt)
        stream = _Stream(time.perf_counter())
        streams.append(stream)
        runtime.engine.submit(TextRequest(prompt, sampling, load.tokens, ignore_eos=True), stream.sink)
    for stream in streams:
        stream.ended.wait()
        if stream.error is not None:
            raise stream.error
    return streams


def _prompt(info: ModelInfo, length: int, salt: int) -> tuple[int, ...]:
    """Ids without meaning, different in every run so that no cache helps (a multiplicative generator, full period)."""
    state, ids = salt + 1, []
    for _ in range(length):
        state = state * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
        ids.append((state >> 33) % (info.vocab_size or 256))
    return tuple(ids)


def _rate(run: Sequence[_Stream]) -> float:
    """Tokens a second of all streams together, from the moment the last of them had its first token."""
    start = max(s.times[0] for s in run)
    end = max(s.times[-1] for s in run)
    count = sum(sum(t > start for t in s.times) for s in run)
    return count / (end - start) if end > start else 0.0


def _spread(values: Sequence[float]) -> dict[str, float]:
    cuts = quantiles(values, n=100, method="inclusive") if len(values) > 1 else [values[0]] * 99 if values else [0.0] * 99
    return {"median": cuts[49], "p90": cuts[89], "p99": cuts[98]}


def _traffic(runtime: TextRuntime) -> dict[str, int]:
    return {s.name: s.count.bytes_sent + s.count.bytes_received for s in runtime.nodes() if s.count is not None}


def floor_seconds(info: ModelInfo, layers: Sequence[str], context: int, bandwidth: float) -> float:
    """Seconds to read once what one token needs of these layers: their weights, and the KV cache of `context` positions."""
    found = [info.layer(name) for name in layers]
    weights = sum(layer.weights_read_per_token for layer in found)
    return (weights + context * sum(layer.kv_bytes_per_token for layer in found)) / bandwidth


def with_floor(report: dict[str, Any], runtime: TextRuntime, speeds: Mapping[str, float]) -> dict[str, Any]:
    """Adds the memory-bandwidth floor of the layers on this node, measured now, and the share of it that was reached."""
    context = report["prompt_tokens"] + report["tokens"] // 2
    floor = floor_seconds(runtime.info, runtime.placement.layers_of(MASTER), context, speeds["memory_bandwidth"])
    reached = floor / report["time_per_token"]["median"] if report["concurrency"] == 1 else None
    return {**report, "memory_bandwidth": speeds["memory_bandwidth"], "floor_seconds": floor, "floor_reached": reached}
