"""What a worker serves: some layers of one model, loaded. Exchanged as a whole when other layers are assigned."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from cake_core.checkpoint import Checkpoint
from cake_core.model import Component, ImageBackend, LoadOptions, ModelInfo, TextBackend
from cake_core.plugins import Plugins
from cake_core.stages.devices import component_options, load_text
from cake_core.stages.stage import LocalStage
from cake_core.worker.parking import Parking

LayerProgress = Callable[[str, int, int], None]
"""`progress(layers, done, total)` in bytes."""


@dataclass(frozen=True, slots=True)
class ServingSpec:
    """Layers of a checkpoint for `node`: `spans` are the stages (or components), in order of execution."""

    checkpoint: Checkpoint
    node: str
    spans: tuple[tuple[str, ...], ...]
    options: LoadOptions = field(default_factory=LoadOptions)
    model_type: str | None = None


class Serving:
    """Describes at once, loads with `load`. A text model has `stages`, an image model `components`."""

    def __init__(self, plugins: Plugins, spec: ServingSpec) -> None:
        self.backend = plugins.backend_for(spec.checkpoint, spec.model_type)
        self.info: ModelInfo = self.backend.describe(spec.checkpoint, spec.options)
        self.spans = spec.spans
        self.stages: list[LocalStage] = []
        self.parking = Parking(self.stages)
        self.components: dict[str, Component] = {}
        self.component_lock = threading.Lock()
        self.fingerprints: dict[str, str] = {}
        self._spec = spec

    def load(self, progress: LayerProgress | None = None) -> None:
        """Loads the layers; what was loaded is freed when one of them cannot be.

        Raises CapacityError before loading when they do not fit.
        """
        try:
            for layers in self.spans:
                self._load(layers, None if progress is None else _bind(progress, ", ".join(layers)))
            self._take_fingerprints()
        except BaseException:
            self.shutdown()
            raise

    def _take_fingerprints(self) -> None:
        """Last, because they need bytes of all tensors, which may still be on their way while layers are loaded."""
        checkpoint = self._spec.checkpoint
        tensors = checkpoint.tensors
        for name in (layer for span in self.spans for layer in span):
            held = [tensor for tensor in self.info.layer(name).tensors if tensor in tensors]
            self.fingerprints[name] = checkpoint.fingerprint(held)[:32]

    def _load(self, layers: tuple[str, ...], report: Callable[[int, int], None] | None) -> None:
        spec = self._spec
        if self.info.model_type == "text":
            text = cast("TextBackend", self.backend)
            self.stages.append(LocalStage(spec.node, load_text(text, spec.checkpoint, self.info, layers, spec.options, report)))
        else:
            image = cast("ImageBackend", self.backend)
            options = component_options(spec.options, len(self.components))
            self.components[layers[0]] = image.load(spec.checkpoint, self.info, layers[0], options, report)

    def report(self) -> dict[str, Any]:
        """Its part of an ATTACHED or REPORT."""
        parts: list[LocalStage] | list[Component] = self.stages or list(self.components.values())
        return {
            "model": self.info.name,
            "identity": dict(self.info.identity),
            "fingerprints": self.fingerprints,
            "memory": [asdict(part.memory()) for part in parts],
            "work": [asdict(stage.clock.count) for stage in self.stages],
        }

    def shutdown(self) -> None:
        """Frees everything. Idempotent."""
        self.parking.end()
        stages, self.stages = self.stages, []
        components, self.components = self.components, {}
        for stage in stages:
            stage.shutdown()
        for component in components.values():
            component.shutdown()


def _bind(progress: LayerProgress, layers: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(layers, done, total)
