"""A lane: one set of shells with the pipelines over them. Lanes paint different images of a request at the same time."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from cake_core.errors import CakeError, ConfigError, RequestError
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_sd.components import Arguments, Results
from cake_sd.layout import FOLDERS, KINDS, component_config
from cake_sd.links import Job, RemoteLink, Replicas
from cake_sd.loading import resolve_class
from cake_sd.options import SdOptions
from cake_sd.quiet import auto_pipeline
from cake_sd.shells import build_shell, settle
from cake_sd.versions import SCHEDULERS

Task = Literal["text2img", "img2img", "inpaint"]


class Captured(Exception):
    """Raised out of a pipeline at its first denoiser call, when the loop is to run elsewhere."""


@dataclass(slots=True)
class Record:
    """What a pipeline got from text encoders and autoencoder before its loop: what another node needs to run the loop."""

    encoded: list[Any] = field(default_factory=list)
    moments: list[torch.Tensor] = field(default_factory=list)


class Lane:
    """Pipelines whose components call the replicas of each layer. One image (or batch) at a time."""

    def __init__(
        self, checkpoint: DiffusersCheckpoint, replicas: Mapping[str, Replicas], sd: SdOptions, home: Home, index: int
    ) -> None:
        self._checkpoint, self._replicas, self._sd, self._home = checkpoint, replicas, sd, home
        self.index = index
        self.job = Job(0)
        self.record: Record | None = None
        self._cache = home.cache
        self._pipelines: dict[Task, Any] = {}
        self._pipelines["text2img"] = self._build()

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self._replicas)

    @property
    def denoisers(self) -> Replicas:
        return next(found for layer, found in self._replicas.items() if KINDS[layer] == "denoiser")

    @property
    def loop_elsewhere(self) -> bool:
        """Whether the loop is to run beside a denoiser that is on another node."""
        return self._sd.loop == "worker" and isinstance(self.denoisers.links[self.index], RemoteLink)

    @property
    def decodes_elsewhere(self) -> bool:
        """Whether the autoencoder computes on another node than the denoiser: the next image need not wait for it then."""
        vae = next(found for layer, found in self._replicas.items() if KINDS[layer] == "vae")
        denoisers = self.denoisers.links if self._sd.parallel == "guidance" else [self.denoisers.links[self.index]]
        return vae.links[self.index % len(vae)].node not in {link.node for link in denoisers}

    def call(self, layer: str, method: str, arguments: Arguments) -> Results:
        """Where every shell's call ends up."""
        kind, replicas = KINDS[layer], self._replicas[layer]
        if kind == "text" and method == "encode":
            return self._cache.get(layer, arguments, lambda: replicas.run(method, self.job, arguments, self.index))
        if kind == "denoiser":
            if self.record is not None:
                raise Captured
            if self._sd.parallel == "guidance" and len(replicas) > 1:
                return replicas.run_halves(self.job, arguments)
        results = replicas.run(method, self.job, arguments, self.index)
        if self.record is not None and kind == "vae":
            self.record.moments.append(results["moments"])
        return results

    def _build(self) -> Any:
        from diffusers import DiffusionPipeline

        parts: dict[str, Any] = {}
        for layer in self._replicas:
            real = resolve_class(self._checkpoint, layer)
            config = component_config(self._checkpoint, layer)
            parts[FOLDERS[layer]] = build_shell(
                KINDS[layer], real, config, self._caller(layer), self._home.dtype, self._home.device
            )
        parts |= {name: None for name in ("safety_checker", "image_encoder", "feature_extractor") if name in self._index}
        parts |= self._home.tokenizers
        try:
            pipeline = DiffusionPipeline.from_pretrained(str(self._checkpoint.path), local_files_only=True, **parts)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"{self._checkpoint.path}: no {self._index.get('_class_name')} can be made of it ({reason}); the master needs "
                "its model_index.json, scheduler, tokenizers and the config.json of each component"
            ) from error
        return settle(pipeline)

    @property
    def _index(self) -> Mapping[str, Any]:
        return self._checkpoint.config

    def _caller(self, layer: str) -> Callable[[str, Arguments], Results]:
        return lambda method, arguments: self.call(layer, method, arguments)

    @property
    def base(self) -> Any:
        """The pipeline as the model index has it."""
        return self._pipelines["text2img"]

    def pipeline(self, task: Task, scheduler: str | None) -> Any:
        """A pipeline for the task with a scheduler of its own. Raises RequestError for a task the model has no pipeline for."""
        if task not in self._pipelines:
            self._pipelines[task] = task_pipeline(self.base, task)
        pipeline = copy.copy(self._pipelines[task])
        pipeline.scheduler = make_scheduler(self.base.scheduler, scheduler)
        return pipeline


@dataclass(frozen=True, slots=True)
class Home:
    """What all lanes share: dtype and device of the arithmetic on the master, tokenizers given on the command line."""

    dtype: torch.dtype
    device: torch.device
    cache: TextCache
    tokenizers: Mapping[str, Any] = field(default_factory=dict)


class TextCache:
    """The latest outputs of text encoders: the same negative prompt comes with every request, the prompt with every image."""

    LIMIT = 64

    def __init__(self) -> None:
        self._found: dict[Any, Results] = {}

    def get(self, layer: str, arguments: Arguments, compute: Callable[[], Results]) -> Results:
        key = (layer, tuple(sorted((name, _hashable(value)) for name, value in arguments.items())))
        results = self._found.pop(key, None) or compute()
        self._found[key] = results
        while len(self._found) > self.LIMIT:
            self._found.pop(next(iter(self._found)), None)
        return results


def _hashable(value: Any) -> Any:
    return (str(value.dtype), str(value.cpu().tolist())) if isinstance(value, torch.Tensor) else str(value)


def task_pipeline(base: Any, task: Task) -> Any:
    """The sibling of a pipeline for another task, over the same components."""
    table = auto_pipeline()
    makers = {"img2img": table.AutoPipelineForImage2Image, "inpaint": table.AutoPipelineForInpainting}
    try:
        pipeline = makers[task].from_pipe(base)
    except (ValueError, TypeError) as error:
        raise RequestError(f"{type(base).__name__} has no {task}; send a request without an image", "init_image") from error
    return settle(pipeline)


def make_scheduler(own: Any, name: str | None) -> Any:
    """A fresh scheduler: the model's own class, or the named one with the model's configuration."""
    import diffusers

    if name is None:
        return type(own).from_config(own.config)
    if ("Flow" in type(own).__name__) != name.startswith("flow"):
        raise RequestError(f"{name} does not fit this model, whose own scheduler is {type(own).__name__}", "scheduler")
    extra = {"timestep_spacing": "trailing"} if name == "euler-ancestral" and _is_turbo(own) else {}
    return getattr(diffusers, SCHEDULERS[name]).from_config(own.config, **extra)


def _is_turbo(own: Any) -> bool:
    return str(own.config.get("timestep_spacing")) == "trailing"


def accepted(pipeline: Any) -> frozenset[str]:
    """Names of the arguments that calling the pipeline takes."""
    return frozenset(inspect.signature(type(pipeline).__call__).parameters)


def lanes_wanted(replicas: Mapping[str, Replicas], sd: SdOptions) -> int:
    """As many as the denoiser has replicas, unless these share each image."""
    if sd.parallel == "guidance":
        return 1
    return max((len(found) for layer, found in replicas.items() if KINDS[layer] == "denoiser"), default=1)


def first_error(errors: Sequence[BaseException]) -> BaseException | None:
    """The one to tell of several lanes' errors: an expected one before a bug's consequence."""
    return next((error for error in errors if isinstance(error, CakeError)), errors[0] if errors else None)
