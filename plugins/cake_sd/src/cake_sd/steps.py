"""Watches a pipeline's loop through `scheduler.step`, the one call that every pipeline makes once a step."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Step:
    """Step `number` (from 1) of `total` took `seconds`. `clean` is the step's estimate of the finished latents."""

    number: int
    total: int
    seconds: float
    clean: torch.Tensor


def watch(pipeline: Any, check: Callable[[], None], on_step: Callable[[Step], None]) -> None:
    """Makes the pipeline's scheduler, which must be its own, report each step. `check` and `on_step` may raise to stop it."""
    scheduler = pipeline.scheduler
    original = scheduler.step
    count, last = 0, time.perf_counter()

    @functools.wraps(original)  # pipelines look at the signature to see whether it takes `eta` and `generator`
    def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal count, last
        check()
        index = getattr(scheduler, "step_index", None)
        result = original(model_output, timestep, sample, *args, **kwargs)
        count, now = count + 1, time.perf_counter()
        total = max(count, _total(pipeline))
        on_step(Step(count, total, now - last, _clean(scheduler, index, model_output, sample, result)))
        last = now
        check()
        return result

    scheduler.step = step


def _total(pipeline: Any) -> int:
    planned = getattr(pipeline, "_num_timesteps", None)
    return int(planned) if planned else len(pipeline.scheduler.timesteps)


def _clean(scheduler: Any, index: int | None, output: torch.Tensor, sample: torch.Tensor, result: Any) -> torch.Tensor:
    """The predicted clean latents where the scheduler tells them or they follow, else the latents as they are."""
    values = result if isinstance(result, tuple) else (result.prev_sample, getattr(result, "pred_original_sample", None))
    if len(values) > 1 and isinstance(values[1], torch.Tensor):
        return values[1]
    if "Flow" in type(scheduler).__name__:
        sigma = scheduler.sigmas[index if index is not None else 0].to(sample.device)
        estimate: torch.Tensor = sample - sigma * output
        return estimate
    previous: torch.Tensor = values[0]
    return previous
