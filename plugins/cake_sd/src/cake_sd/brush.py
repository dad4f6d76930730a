"""Paints one batch of images on one lane: the pipeline up to its latents, here or beside the denoiser, then decoding."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from cake_core import png
from cake_core.errors import CakeError, RequestError, StageError
from cake_core.events import ImageDone, ImagePreview, ImageStep
from cake_sd.encode import hook_encoding
from cake_sd.lane import Captured, Lane, Record
from cake_sd.layout import KINDS
from cake_sd.links import Link
from cake_sd.plan import Batch, Plan
from cake_sd.preview import LinearPreview, crop, to_decoder, to_latents
from cake_sd.shells import Decoded
from cake_sd.steps import Step, watch

Emit = Callable[[Any], None]


class Brush:
    """One use: paints one batch."""

    def __init__(self, lane: Lane, plan: Plan, preview: LinearPreview, emit: Emit) -> None:
        self._lane, self._plan, self._preview, self._emit = lane, plan, preview, emit
        self._batch = Batch(0, ())
        self._last: torch.Tensor | None = None
        self._pipeline: Any = lane.pipeline(plan.task, plan.scheduler)

    def denoise(self, batch: Batch) -> torch.Tensor:
        """What is to be decoded. Raises RequestError for what the pipeline refuses, StageError for latents that are no
        numbers."""
        self._batch = batch
        z = self._elsewhere() if self._lane.loop_elsewhere else self._here()
        self._check_numbers(z)
        return z

    def finish(self, z: torch.Tensor) -> list[ImageDone]:
        """The pictures. May be called from another thread: the lane may be painting the next ones."""
        batch, pixels = self._batch, self._decode(z)
        if self._last is not None:
            self._preview.learn(to_latents(self._pipeline, self._last, self._plan.width, self._plan.height), pixels)
        height, width = pixels.shape[1:3]
        return [
            ImageDone(batch.first + index, width, height, image.numpy().tobytes(), batch.seeds[index])
            for index, image in enumerate(pixels.cpu())
        ]

    def _here(self) -> torch.Tensor:
        """The loop on the master: every step calls the denoiser."""
        hook_encoding(self._pipeline, self._plan.asked.long_prompts, None)
        watch(self._pipeline, self._lane.job.check, self._on_step)
        return self._run()

    def _run(self) -> torch.Tensor:
        call = {**self._plan.call, "num_images_per_prompt": len(self._batch.seeds), "generator": self._generators()}
        if (pictures := self._plan.pictures) is not None:
            call["image"] = pictures.image
            if pictures.mask is not None:
                call["mask_image"] = pictures.mask
        try:
            with torch.no_grad():
                self._pipeline(**call)
        except Decoded as decoded:
            return decoded.z
        except (CakeError, Captured):
            raise
        except (ValueError, TypeError) as error:
            # What pipelines raise when they check their inputs.
            raise RequestError(f"{type(self._pipeline).__name__}: {error}") from error
        raise StageError(f"{type(self._pipeline).__name__} did not decode its latents; cake-sd cannot run it")

    def _generators(self) -> Any:
        """One a picture, on the CPU, so that an image is the same wherever and beside whichever others it is painted."""
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in self._batch.seeds]
        return generators[0] if len(generators) == 1 else generators

    def _elsewhere(self) -> torch.Tensor:
        """The loop beside the denoiser: record what the pipeline needs before its first step, send it, and listen."""
        lane = self._lane
        lane.record = record = Record()
        try:
            hook_encoding(self._pipeline, self._plan.asked.long_prompts, record)
            self._run()
        except Captured:
            arguments = self._loop_arguments(record)
        else:
            raise StageError("the pipeline made no step; cake-sd cannot run its loop elsewhere")
        finally:
            lane.record = None
        return lane.denoisers.attempt(lane.job, lane.index, lambda link: self._follow(link, arguments))

    def _loop_arguments(self, record: Record) -> dict[str, Any]:
        pipeline, pictures = self._pipeline, self._plan.pictures
        scheduler = pipeline.scheduler
        settings = {k: v for k, v in pipeline.config.items() if not k.startswith("_") and isinstance(v, (bool, int, float))}
        description = {
            "task": self._plan.task,
            "scheduler": {"class": type(scheduler).__name__, "config": dict(scheduler.config)},
            "vae": dict(pipeline.vae.config),
            "settings": settings,
        }
        call = {**self._plan.call, "num_images_per_prompt": len(self._batch.seeds)}
        arguments = {
            "pipeline": json.dumps(description, default=str),
            "call": json.dumps(call),
            "seeds": list(self._batch.seeds),
            "encoded": record.encoded,
            "moments": record.moments,
            "preview_every": self._plan.preview_every,
        }
        if pictures is not None:
            arguments["size"] = [pictures.width, pictures.height]
            if pictures.mask is not None:
                arguments["mask"] = torch.frombuffer(bytearray(pictures.mask.tobytes()), dtype=torch.uint8).reshape(
                    pictures.height, pictures.width
                )
        return arguments

    def _follow(self, link: Link, arguments: dict[str, Any]) -> torch.Tensor:
        job = self._lane.job
        link.run("loop_begin", job, arguments)
        while True:
            job.check()
            results = link.run("loop_next", job, {})
            if "lost" in results:
                # The worker came back without what it was told: the loop starts anew, from the same seeds.
                link.run("loop_begin", job, arguments)
                continue
            if (z := results.get("z")) is not None:
                return z
            number, total, seconds = results["step"].tolist()
            latents = results.get("latents")
            self._tell(int(number), int(total), seconds)
            if latents is not None:
                self._show(int(number), latents)

    def _on_step(self, step: Step) -> None:
        self._last = step.clean
        self._tell(step.number, step.total, step.seconds)
        every = self._plan.preview_every
        if every and step.number % every == 0:
            self._show(step.number, step.clean)

    def _tell(self, number: int, total: int, seconds: float) -> None:
        for index in range(len(self._batch.seeds)):
            self._emit(ImageStep(self._batch.first + index, number, total, seconds))

    def _show(self, number: int, latents: torch.Tensor) -> None:
        latents = to_latents(self._pipeline, latents, self._plan.width, self._plan.height)
        if not bool(torch.isfinite(latents).all()):
            return
        for index, image in enumerate(self._picture(latents).cpu()):
            height, width = image.shape[:2]
            data = png.encode(image.contiguous().numpy().tobytes(), width, height)
            self._emit(ImagePreview(self._batch.first + index, number, data))

    def _picture(self, latents: torch.Tensor) -> torch.Tensor:
        if self._plan.asked.preview == "decode":
            return self._decode(to_decoder(self._pipeline, latents))
        if not self._preview.learnt:
            small = crop(latents)
            self._preview.learn(small, self._decode(to_decoder(self._pipeline, small)), finished=False)
        return self._preview.pixels(latents)

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        return self._lane.call("vae", "decode", {"z": z})["image"]

    def _check_numbers(self, z: torch.Tensor) -> None:
        if not bool(torch.isfinite(z).all()):
            denoiser = next(layer for layer in self._lane.layers if KINDS[layer] == "denoiser")
            raise StageError(
                f"the latents are no numbers any more; {str(z.dtype).removeprefix('torch.')} is the likely reason: "
                f"start the node that holds {denoiser} with --dtype bf16 or f32"
            )
