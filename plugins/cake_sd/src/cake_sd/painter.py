"""The whole image model: takes a request apart into images, paints them on lanes, and tells of each step."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from cake_core.errors import Cancelled, ConfigError, NodeMismatch, StageError
from cake_core.events import ImageWarning
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.model import Component, ModelInfo
from cake_core.requests import ImageRequest
from cake_sd.brush import Brush
from cake_sd.components import About, TorchComponent
from cake_sd.decoding import Decoding, InOrder
from cake_sd.lane import Home, Lane, TextCache, first_error, lanes_wanted
from cake_sd.layout import KINDS, component_config
from cake_sd.links import Job, Link, LocalLink, RemoteLink, Replicas, Traffic
from cake_sd.loading import config_digest, load_tokenizer
from cake_sd.options import SdOptions
from cake_sd.plan import Batch, Plan, make_plan
from cake_sd.preview import LinearPreview
from cake_sd.quiet import quieten
from cake_sd.trace import Trace
from cake_sd.wire import DTYPES

Emit = Callable[[Any], None]


class Painter:
    """An `ImageModel` over components that are here or elsewhere."""

    def __init__(
        self,
        checkpoint: DiffusersCheckpoint,
        info: ModelInfo,
        components: Mapping[str, Sequence[Component]],
        sd: SdOptions,
    ) -> None:
        quieten()
        missing = [layer.name for layer in info.layers if not components.get(layer.name)]
        if missing:
            raise ConfigError(
                f"nothing serves {', '.join(missing)} of {info.name}; give it to a node, or leave it to the master"
            )
        self.info, self._sd, self._checkpoint = info, sd, checkpoint
        self._ids = itertools.count(1)
        self._components = {layer.name: tuple(components[layer.name]) for layer in info.layers}
        abouts = _introduce(checkpoint, self._components, sd)
        home = Home(_dtype(abouts), _device(self._components), TextCache(), _tokenizers(checkpoint, sd))
        self._replicas = {layer: _replicas(layer, found, home) for layer, found in self._components.items()}
        self._lanes = [Lane(checkpoint, self._replicas, sd, home, index) for index in range(lanes_wanted(self._replicas, sd))]
        self._threads = ThreadPoolExecutor(len(self._lanes), "cake-sd lane") if len(self._lanes) > 1 else None
        self._decoders = ThreadPoolExecutor(len(self._lanes), "cake-sd decoding")
        self._preview = LinearPreview()
        self.traffic = Traffic()
        """Of the latest request: what crossed nodes."""

    def generate(self, request: ImageRequest, emit: Emit, cancelled: Callable[[], bool]) -> None:
        job = Job(next(self._ids), cancelled)
        lock = threading.Lock()

        def tell(event: Any) -> None:
            with lock:
                emit(event)

        try:
            plan = make_plan(request, self._lanes[0], self._checkpoint, self._sd)
            for warning in plan.warnings:
                tell(warning)
            job.trace = Trace() if plan.asked.trace else None
            self._paint(plan, job, tell)
            if job.trace is not None:
                tell(ImageWarning(f"wrote {job.trace.write(Path.cwd())}"))
        finally:
            self.traffic = job.traffic
            for replicas in self._replicas.values():
                replicas.close(job.id)

    def _paint(self, plan: Plan, job: Job, emit: Emit) -> None:
        queue = iter(plan.batches)
        order = InOrder(emit)
        guard = threading.Lock()
        stop = threading.Event()
        shared = Job(job.id, lambda: stop.is_set() or job.cancelled(), job.traffic, job.trace)

        def work(lane: Lane) -> None:
            lane.job = shared
            try:
                with Decoding(order, self._decoders if lane.decodes_elsewhere else None) as decoding:
                    while (batch := take()) is not None:
                        brush = Brush(lane, plan, self._preview, emit)
                        decoding.add(brush, brush.denoise(batch))
            except BaseException:
                stop.set()
                raise

        def take() -> Batch | None:
            with guard:
                return next(queue, None)

        if self._threads is None or len(plan.batches) == 1:
            work(self._lanes[0])
            return
        futures = [self._threads.submit(work, lane) for lane in self._lanes]
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        real = [error for error in errors if not isinstance(error, Cancelled)]
        if error := first_error(real or errors):
            raise error

    def shutdown(self) -> None:
        self._decoders.shutdown()
        if self._threads is not None:
            self._threads.shutdown()
        for replicas in self._replicas.values():
            replicas.shutdown()


def _introduce(
    checkpoint: DiffusersCheckpoint, components: Mapping[str, Sequence[Component]], sd: SdOptions
) -> dict[str, list[About]]:
    """Asks each component what it is. Raises NodeMismatch for one of another model, ConfigError for one with other LoRAs."""
    abouts: dict[str, list[About]] = {}
    for layer, found in components.items():
        expected = config_digest(component_config(checkpoint, layer))
        for component in found:
            about = _about(component)
            if about.config != expected:
                raise NodeMismatch(
                    f"the {layer} that serves here is a {about.class_name} of another model than {checkpoint.name}; start its "
                    "worker with the same --model"
                )
            abouts.setdefault(layer, []).append(about)
    _same_loras(abouts, sd)
    return abouts


def _about(component: Component) -> About:
    if isinstance(component, TorchComponent):
        return component.about
    from cake_sd.wire import from_wire

    try:
        return About.decode(from_wire(component.call("about", 0, {}, {}, {})["about"]))
    finally:
        component.close(0)


def _same_loras(abouts: Mapping[str, Sequence[About]], sd: SdOptions) -> None:
    """A LoRA changes text encoders and denoiser together: a node that was not given it would silently paint without."""
    loaded = {layer: {about.lora for about in found} for layer, found in abouts.items() if KINDS[layer] != "vae"}
    sets = {lora for found in loaded.values() for lora in found}
    if len(sets) > 1 or (sd.lora and sets == {()}):
        without = [layer for layer, found in loaded.items() if () in found]
        raise ConfigError(
            f"the nodes were given different LoRAs ({', '.join(without) or 'all layers'} lack one); start the master and every "
            "worker that holds a text encoder or the denoiser with the same --sd-lora"
        )


def _dtype(abouts: Mapping[str, Sequence[About]]) -> torch.dtype:
    """The denoiser's: latents are what is computed most."""
    for layer, found in abouts.items():
        if KINDS[layer] == "denoiser":
            return DTYPES[found[0].dtype]
    raise StageError("the model has no denoiser")


def _device(components: Mapping[str, Sequence[Component]]) -> torch.device:
    """Where the arithmetic of the pipeline happens: on the accelerator of a component that is here, else on the CPU."""
    devices = [c.device for found in components.values() for c in found if isinstance(c, TorchComponent)]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _replicas(layer: str, found: Sequence[Component], home: Home) -> Replicas:
    links: list[Link] = [
        LocalLink(c) if isinstance(c, TorchComponent) else RemoteLink(c, home.device) for c in found
    ]  # fmt: skip
    return Replicas(layer, links)


def _tokenizers(checkpoint: DiffusersCheckpoint, sd: SdOptions) -> dict[str, Any]:
    return {part: load_tokenizer(checkpoint, part, path) for part, path in sd.tokenizers.items()}
