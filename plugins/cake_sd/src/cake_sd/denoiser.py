"""The denoiser's component: one forward pass a call, or the whole loop (see `loop`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from cake_core.errors import StageError
from cake_sd.components import About, Arguments, Results, TorchComponent

if TYPE_CHECKING:
    from cake_sd.loop import Loop

SAMPLES = ("sample", "hidden_states")
"""Names under which unets and transformers take the latents."""

REPEAT = "repeat"
"""Argument that says how many equal copies of the sample, one after another, the batch consists of."""


def sample_name(arguments: Mapping[str, Any]) -> str:
    """Which of the arguments is the latents. Raises StageError when none is."""
    for name in SAMPLES:
        if isinstance(arguments.get(name), torch.Tensor):
            return name
    raise StageError("a denoiser was called without latents; the pipeline is not one that cake-sd knows how to split")


class DenoiserComponent(TorchComponent):
    """A unet or a transformer."""

    def __init__(self, about: About, module: torch.nn.Module, pipeline: str) -> None:
        super().__init__(about, module)
        self.methods |= {"forward": self._forward, "loop_begin": self._loop_begin, "loop_next": self._loop_next}
        self._pipeline = pipeline
        self._loops: dict[int, Loop] = {}

    def _forward(self, _request: int, arguments: Arguments) -> Results:
        inputs = {name: value for name, value in arguments.items() if name != REPEAT}
        sample = sample_name(inputs)
        dtype = inputs[sample].dtype
        if copies := arguments.get(REPEAT):
            inputs[sample] = torch.cat([inputs[sample]] * int(copies))
        output: Any = self.module(**self.cast(inputs, dtype), return_dict=False)
        return {"output": output[0]}

    def _loop_begin(self, request: int, arguments: Arguments) -> Results:
        from cake_sd.loop import Loop

        if request in self._loops:
            self._loops.pop(request).stop()
        self._loops[request] = Loop(self, self._pipeline, arguments)
        return {}

    def _loop_next(self, request: int, _arguments: Arguments) -> Results:
        loop = self._loops.get(request)
        if loop is None:
            return {"lost": torch.zeros(1, dtype=torch.uint8)}
        return loop.next()

    def close(self, request: int) -> None:
        if loop := self._loops.pop(request, None):
            loop.stop()

    def shutdown(self) -> None:
        for request in list(self._loops):
            self.close(request)
        super().shutdown()
