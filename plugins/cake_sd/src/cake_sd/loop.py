"""The whole denoising loop beside the denoiser: the same diffusers pipeline, with what the master encoded played back.

The master runs its pipeline up to the first denoiser call and records what text encoders and autoencoder answered. Here the
same pipeline class starts from the same seeds, gets the recorded answers, and goes on to the point where it would decode.
Randomness is drawn in the same order by the same calls, so the latents are the same bits.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from cake_core.errors import CakeError, Cancelled, StageError
from cake_sd.components import Arguments, Results
from cake_sd.quiet import auto_pipeline
from cake_sd.shells import Decoded, build_shell, settle
from cake_sd.steps import Step, watch
from cake_sd.versions import SCHEDULERS

if TYPE_CHECKING:
    from cake_sd.denoiser import DenoiserComponent


class Loop:
    """One run of the loop in a thread of its own; `next` waits for its next step."""

    def __init__(self, component: DenoiserComponent, pipeline: str, arguments: Arguments) -> None:
        self._condition = threading.Condition()
        self._steps: list[Results] = []
        self._result: torch.Tensor | None = None
        self._error: BaseException | None = None
        self._stopped = False
        self._every = int(arguments["preview_every"])
        self._pipeline = _build(component, pipeline, arguments)
        self._arguments = arguments
        self._thread = threading.Thread(target=self._run, name="cake-sd loop", daemon=True)
        self._thread.start()

    def next(self) -> Results:
        """`step` f64 [number, total, seconds], with `latents` when a preview is due; after the last one `z`."""
        with self._condition:
            self._condition.wait_for(lambda: self._steps or self._result is not None or self._error is not None)
            if self._steps:
                return self._steps.pop(0)
            if self._error is not None:
                raise self._error
            if self._result is None:
                raise StageError("the loop ended without latents; this is a bug")
            return {"z": self._result}

    def stop(self) -> None:
        """Ends the loop within its current step."""
        self._stopped = True
        self._thread.join()

    def _check(self) -> None:
        if self._stopped:
            raise Cancelled("the master closed the request")

    def _on_step(self, step: Step) -> None:
        result = {"step": torch.tensor([step.number, step.total, step.seconds], dtype=torch.float64)}
        if self._every and step.number % self._every == 0:
            result["latents"] = step.clean
        with self._condition:
            self._steps.append(result)
            self._condition.notify_all()

    def _run(self) -> None:
        try:
            watch(self._pipeline, self._check, self._on_step)
            with torch.no_grad():
                self._pipeline(**_call_arguments(self._arguments))
            error: BaseException = StageError("the pipeline decoded nothing; this is a bug")
        except Decoded as decoded:
            self._finish(decoded.z, None)
            return
        except CakeError as expected:
            error = expected
        except Exception as unexpected:
            error = StageError(f"the denoising loop failed: {type(unexpected).__name__}: {unexpected}")
        self._finish(None, error)

    def _finish(self, result: torch.Tensor | None, error: BaseException | None) -> None:
        with self._condition:
            self._result, self._error = result, error
            self._condition.notify_all()


def _build(component: DenoiserComponent, pipeline: str, arguments: Arguments) -> Any:
    """The pipeline with the denoiser, a shell of the autoencoder that plays back moments, and no text encoder."""
    import diffusers

    description: Mapping[str, Any] = json.loads(str(arguments["pipeline"]))
    real: Any = _sibling(getattr(diffusers, pipeline), str(description["task"]))
    scheduler = description["scheduler"]
    if scheduler["class"] not in {*SCHEDULERS.values()}:
        raise StageError(f"the loop does not run with {scheduler['class']} here; use --sd-loop master")
    moments = iter(arguments["moments"])
    dtype, device = component.dtype, component.device
    vae_class = getattr(diffusers, str(description["vae"]["_class_name"]))
    vae = build_shell("vae", vae_class, description["vae"], lambda _m, _a: {"moments": next(moments)}, dtype, device)
    parts: dict[str, Any] = {
        "scheduler": getattr(diffusers, scheduler["class"]).from_config(scheduler["config"]),
        "vae": vae,
        component.name: component.module,
        **description["settings"],
    }
    names = [name for name in inspect.signature(real.__init__).parameters if name != "self"]
    required = {name: parts.get(name) for name, parameter in inspect.signature(real.__init__).parameters.items()
                if name != "self" and (name in parts or parameter.default is inspect.Parameter.empty)}  # fmt: skip
    if "requires_safety_checker" in names:
        required["requires_safety_checker"] = False
    built = settle(real(**required))
    encoded = iter(arguments["encoded"])
    built.encode_prompt = lambda *_args, **_kwargs: tuple(next(encoded))
    return built


def _sibling(real: Any, task: str) -> Any:
    """The class that does `task`, for the class that the model index names."""
    if task == "text2img":
        return real
    table = auto_pipeline()
    mappings = {"img2img": table.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, "inpaint": table.AUTO_INPAINT_PIPELINES_MAPPING}
    if task not in mappings:
        raise StageError(f"the loop knows no task {task!r}")
    return table._get_task_class(mappings[task], real.__name__)


def _call_arguments(arguments: Arguments) -> dict[str, Any]:
    """Arguments of the pipeline's call: the plain ones as the master had them, generators from seeds, blank start images.

    A start image only matters through its encoding, which is played back; its size and the mask do matter.
    """
    call: dict[str, Any] = json.loads(str(arguments["call"]))
    seeds = [int(seed) for seed in arguments["seeds"]]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    call["generator"] = generators[0] if len(generators) == 1 else generators
    if size := arguments.get("size"):
        from PIL import Image

        call["image"] = Image.new("RGB", (int(size[0]), int(size[1])))
        if (mask := arguments.get("mask")) is not None:
            call["mask_image"] = Image.fromarray(mask.cpu().numpy())
    return call
