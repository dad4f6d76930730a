"""Prometheus metrics on a registry of our own, so that two servers in one process do not share numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from cake_core.cluster.chain import Places
from cake_core.events import Usage
from cake_core.runtime import ImageRuntime, TextRuntime
from cake_core.topology import compress

if TYPE_CHECKING:
    from cake_server.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4"
"""Litestar adds the charset."""
_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_INTER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_STEP = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """What the server counts itself; what engine and nodes know is asked when somebody scrapes."""

    def __init__(self, service: Service) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "cake_requests", "HTTP requests by endpoint and status.", ("endpoint", "status"), registry=registry
        )
        self.first_token = Histogram(
            "cake_time_to_first_token_seconds", "From request to first token.", buckets=_FIRST_TOKEN, registry=registry
        )
        self.inter_token = Histogram(
            "cake_inter_token_latency_seconds", "Between two tokens of an answer.", buckets=_INTER_TOKEN, registry=registry
        )
        self.whole = Histogram(
            "cake_e2e_request_latency_seconds", "From request to last token.", buckets=_WHOLE, registry=registry
        )
        self.image_step = Histogram(
            "cake_image_step_seconds", "One denoising step of an image.", buckets=_STEP, registry=registry
        )
        self.prompt_tokens = Counter("cake_prompt_tokens", "Prompt tokens.", registry=registry)
        self.generation_tokens = Counter("cake_generation_tokens", "Generated tokens.", registry=registry)
        self.cache_hits = Counter("cake_prefix_cache_hits", "Prompt tokens found in the prefix cache.", registry=registry)
        self.images = Counter("cake_images", "Images finished.", registry=registry)
        self.streams = Gauge("cake_http_requests_in_flight", "HTTP requests being answered.", registry=registry)
        registry.register(_EngineCollector(service))

    def prompt(self, usage: Usage) -> None:
        self.prompt_tokens.inc(usage.prompt_tokens)
        self.cache_hits.inc(usage.cached_tokens)

    def finished(self, seconds: float) -> None:
        self.whole.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Any]:
        yield from self._engine()
        yield from self._nodes()

    def _engine(self) -> Iterator[Any]:
        runtime = self._service.runtime
        if isinstance(runtime, TextRuntime):
            stats = runtime.engine.stats()
            yield GaugeMetricFamily("cake_requests_running", "Sequences being generated.", stats.running)
            yield GaugeMetricFamily("cake_requests_waiting", "Sequences in the queue.", stats.waiting)
            used = stats.kv_tokens_used / stats.kv_tokens if stats.kv_tokens else 0.0
            yield GaugeMetricFamily("cake_kv_cache_usage_ratio", "Share of the KV cache in use, at the tightest stage.", used)
            yield CounterMetricFamily("cake_preemptions", "Sequences sent back to the queue for want of KV.", stats.preemptions)
            yield CounterMetricFamily("cake_positions", "Positions forwarded.", stats.positions)
            yield CounterMetricFamily("cake_batches", "Batches forwarded; positions over batches is their size.", stats.batches)
            yield CounterMetricFamily(
                "cake_batch_seconds", "For which batches were on their way through the stages, wires included.", stats.seconds
            )
            legs = CounterMetricFamily("cake_leg_seconds", "For which batches were on this way and back.", labels=("way",))
            for way, seconds in _ways(stats.legs).items():
                legs.add_metric((way,), seconds)
            yield legs
            yield from _stages(runtime)
            yield CounterMetricFamily("cake_guessed_tokens", "Tokens guessed and forwarded.", stats.proposed)
            yield CounterMetricFamily("cake_accepted_tokens", "Guessed tokens that were right.", stats.accepted)
        elif isinstance(runtime, ImageRuntime):
            yield GaugeMetricFamily("cake_requests_running", "Image jobs under way.", int(runtime.engine.running))
            yield GaugeMetricFamily("cake_requests_waiting", "Image jobs in the queue.", runtime.engine.waiting)

    def _nodes(self) -> Iterator[Any]:
        up = GaugeMetricFamily("cake_node_up", "1 while the node serves.", labels=("node",))
        traffic = CounterMetricFamily("cake_hop_bytes", "Bytes to and from a node over its link.", labels=("node", "dir"))
        for status in self._service.nodes():
            up.add_metric((status.name,), int(status.state == "up"))
            if status.count is not None:
                traffic.add_metric((status.name, "sent"), status.count.bytes_sent)
                traffic.add_metric((status.name, "received"), status.count.bytes_received)
        yield up
        yield traffic


def _ways(legs: Mapping[Places, float]) -> dict[str, float]:
    """Seconds by the nodes that a leg leads over."""
    found: dict[str, float] = {}
    for places, seconds in legs.items():
        way = " -> ".join(node for node, _ in places)
        found[way] = found.get(way, 0.0) + seconds
    return found


def _stages(runtime: TextRuntime) -> Iterator[Any]:
    """Work and KV of every stage, wherever it is."""
    labels = ("node", "layers")
    seconds = CounterMetricFamily("cake_stage_compute_seconds", "For which the stage computed.", labels=labels)
    batches = CounterMetricFamily("cake_stage_batches", "Batches of the stage.", labels=labels)
    positions = CounterMetricFamily("cake_stage_positions", "Positions of the stage.", labels=labels)
    used = GaugeMetricFamily("cake_stage_kv_usage_ratio", "Share of the stage's KV cache that is in use.", labels=labels)
    for span, count, memory in runtime.parts():
        node, layers = span.node, ", ".join(compress(span.layers))
        seconds.add_metric((node, layers), count.seconds)
        batches.add_metric((node, layers), count.batches)
        positions.add_metric((node, layers), count.positions)
        if memory.kv_tokens:
            used.add_metric((node, layers), 1 - memory.kv_tokens_free / memory.kv_tokens)
    yield from (seconds, batches, positions, used)
