"""Samples to numbers. The definitions are those of the field's load generators:

- time to first token: from sending to the first chunk with text
- time per token: (end of the text - first token) / (tokens - 1), one value a request
- inter-token latency: between two chunks with text, all of them
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from cake_server.bench.client import Sample

PERCENTILES = (50, 90, 95, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest; `values` not empty."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, smallest, largest and percentiles, in milliseconds; None for no values."""
    if not values:
        return None
    scaled = [value * 1000 for value in values]
    result = {"mean": sum(scaled) / len(scaled), "min": min(scaled), "max": max(scaled)}
    result.update({f"p{percent}": percentile(scaled, percent) for percent in PERCENTILES})
    return {name: round(value, 3) for name, value in result.items()}


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    good = [sample for sample in samples if not sample.error]
    wall = max((s.end for s in samples), default=0.0) - min((s.start for s in samples), default=0.0)
    output = sum(tokens(sample) for sample in good)
    return {
        "requests": len(samples),
        "completed": len(good),
        "errors": dict(Counter(sample.error for sample in samples if sample.error)),
        "seconds": round(wall, 3),
        "requests_per_second": _rate(len(good), wall),
        "prompt_tokens": sum(sample.prompt_tokens for sample in good),
        "output_tokens": output,
        "output_tokens_per_second": _rate(output, wall),
        "time_to_first_token_ms": spread([s.times[0] - s.start for s in good if s.times]),
        "time_per_token_ms": spread([per_token(s) for s in good if s.times and tokens(s) > 1]),
        "inter_token_ms": spread([b - a for s in good for a, b in zip(s.times, s.times[1:], strict=False)]),
        "request_ms": spread([s.end - s.start for s in good]),
    }


def tokens(sample: Sample) -> int:
    """As the server counted, else one a chunk."""
    return sample.completion_tokens or len(sample.times)


def per_token(sample: Sample) -> float:
    return (sample.times[-1] - sample.times[0]) / (tokens(sample) - 1)


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 3) if seconds else 0.0
