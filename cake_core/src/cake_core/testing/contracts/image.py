"""`ImageBackendContract`: what every image backend must do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest

from cake_core.checkpoint import Checkpoint
from cake_core.errors import Cancelled, StageError
from cake_core.events import ImagePreview, ImageStep
from cake_core.model import BACKEND_API, Component, ImageBackend, ImageModel, LoadOptions, ModelInfo
from cake_core.requests import ImageRequest
from cake_core.testing.contracts.image_rig import Assemble, Recorder, paint, pictures
from cake_core.testing.contracts.text import DESCRIBE
from cake_core.testing.contracts.threads import Task

PNG = b"\x89PNG\r\n\x1a\n"


class ImageBackendContract:
    """Fixtures to give: `backend` and `checkpoint` (small); `options` where the backend needs some.

    Attributes:
        request: the job that is tried; small and with few steps, at least three.
        seconds_to_cancel: how long after `cancelled()` turned true the slowest step may still take.
    """

    request: ClassVar[ImageRequest] = ImageRequest("a cake with candles", "rain", 64, 64, steps=4, seed=7)
    seconds_to_cancel: ClassVar[float] = 5.0
    heavy: ClassVar[tuple[str, ...]] = ("torch", "numpy", "transformers", "diffusers", "asyncio")

    @pytest.fixture
    def backend(self) -> ImageBackend:
        raise NotImplementedError("the test class must have a fixture `backend` that returns the ImageBackend")

    @pytest.fixture
    def checkpoint(self) -> Checkpoint:
        raise NotImplementedError("the test class must have a fixture `checkpoint`: a small model of the backend")

    @pytest.fixture
    def options(self) -> LoadOptions:
        return LoadOptions(dtype="f32", device="cpu")

    @pytest.fixture
    def info(self, backend: ImageBackend, checkpoint: Checkpoint, options: LoadOptions) -> ModelInfo:
        return backend.describe(checkpoint, options)

    @pytest.fixture
    def components(
        self, backend: ImageBackend, checkpoint: Checkpoint, info: ModelInfo, options: LoadOptions
    ) -> Iterator[dict[str, Component]]:
        loaded = {layer.name: backend.load(checkpoint, info, layer.name, options) for layer in info.layers}
        yield loaded
        for component in loaded.values():
            component.shutdown()

    @pytest.fixture
    def assemble(
        self,
        backend: ImageBackend,
        checkpoint: Checkpoint,
        info: ModelInfo,
        options: LoadOptions,
        components: dict[str, Component],
    ) -> Assemble:
        """`assemble()` has every component local; `assemble(clip=[...])` takes others for one layer."""

        def assemble(**others: Sequence[Component]) -> ImageModel:
            given = {name: others.get(name, [component]) for name, component in components.items()}
            return backend.assemble(checkpoint, info, given, options)

        return assemble

    def test_describes_itself(self, backend: ImageBackend, checkpoint: Checkpoint, info: ModelInfo) -> None:
        assert isinstance(backend, ImageBackend)
        assert (backend.api, backend.model_type, info.model_type) == (BACKEND_API, "image", "image")
        assert info.backend == backend.name
        names = [layer.name for layer in info.layers]
        assert {"clip", "unet", "vae"} <= set(names)
        assert len(set(names)) == len(names)
        for layer in info.layers:
            assert layer.nbytes > 0
            assert layer.tensors
            assert set(layer.tensors) <= set(checkpoint.tensors)

    def test_describing_imports_nothing_heavy(self, backend: ImageBackend, checkpoint: Checkpoint) -> None:
        arguments = [type(backend).__module__, type(backend).__qualname__, type(checkpoint).__module__]
        arguments += [type(checkpoint).__qualname__, str(checkpoint.path), ",".join(self.heavy)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", DESCRIBE, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
        assert (done.returncode, done.stdout.split()) == (0, []), done.stderr

    def test_paints_what_was_asked(self, assemble: Assemble) -> None:
        events = paint(assemble(), self.request)
        (picture,) = pictures(events)
        assert (picture.width, picture.height, picture.seed) == (self.request.width, self.request.height, self.request.seed)
        assert len(picture.rgb) == picture.width * picture.height * 3
        assert len(set(picture.rgb)) > 16
        steps = [event for event in events if isinstance(event, ImageStep)]
        assert [step.step for step in steps] == list(range(1, steps[0].steps + 1))
        assert all(step.image == 0 and step.seconds >= 0 for step in steps)

    def test_any_split_paints_the_same_bits(
        self, assemble: Assemble, info: ModelInfo, components: dict[str, Component]
    ) -> None:
        """Each component remote, then all of them."""
        expected = pictures(paint(assemble(), self.request))
        names = [layer.name for layer in info.layers]
        for remote in (*([name] for name in names), names):
            recorders = {name: [Recorder(components[name])] for name in remote}
            assert pictures(paint(assemble(**recorders), self.request)) == expected, f"remote: {remote}"
            # A component that was not called would make the comparison empty.
            assert all(recorder.calls for (recorder,) in recorders.values())

    def test_prompt_seed_and_steps_matter(self, assemble: Assemble) -> None:
        model = assemble()
        requests = [
            self.request,
            replace(self.request, prompt="a lighthouse in a storm"),
            replace(self.request, negative_prompt="sun"),
            replace(self.request, seed=self.request.seed + 1),
            replace(self.request, steps=(self.request.steps or 4) - 1),
        ]
        found = [pictures(paint(model, request))[0].rgb for request in requests]
        assert len(set(found)) == len(requests)
        assert pictures(paint(model, self.request))[0].rgb == found[0]

    def test_several_images_are_single_images_of_the_next_seeds(self, assemble: Assemble) -> None:
        model = assemble()
        together = pictures(paint(model, replace(self.request, images=3)))
        assert [(picture.image, picture.seed) for picture in together] == [(k, self.request.seed + k) for k in range(3)]
        for picture in together:
            (alone,) = pictures(paint(model, replace(self.request, seed=picture.seed)))
            assert alone.rgb == picture.rgb

    def test_previews_come_between_the_steps_and_change_nothing(self, assemble: Assemble) -> None:
        model = assemble()
        events = paint(model, replace(self.request, preview_every=2))
        previews = [event for event in events if isinstance(event, ImagePreview)]
        assert previews
        assert all(preview.png.startswith(PNG) for preview in previews)
        assert [preview.step % 2 for preview in previews] == [0] * len(previews)
        assert pictures(events) == pictures(paint(model, self.request))

    @pytest.mark.parametrize("after", [0, 1, 2])
    def test_cancels_within_one_step(self, assemble: Assemble, after: int) -> None:
        model, events = assemble(), list[Any]()

        def steps() -> int:
            return sum(isinstance(event, ImageStep) for event in events)

        asked = 0.0

        def cancelled() -> bool:
            nonlocal asked
            asked = asked or (time.monotonic() if steps() >= after else 0.0)
            return steps() >= after

        painting = Task(lambda: model.generate(self.request, events.append, cancelled))
        with pytest.raises(Cancelled):
            painting.result()
        assert time.monotonic() - asked < self.seconds_to_cancel
        assert steps() <= after + 1
        assert not pictures(events)
        assert len(pictures(paint(model, self.request))) == 1

    def test_what_does_not_change_is_a_constant(
        self, assemble: Assemble, info: ModelInfo, components: dict[str, Component]
    ) -> None:
        """No tensor goes to one component twice in a job unless as a constant, which the wire sends once."""
        recorders = {layer.name: [Recorder(components[layer.name])] for layer in info.layers}
        paint(assemble(**recorders), self.request)
        for (recorder,) in recorders.values():
            sent = [bytes(t.data) for _, _, tensors, _, _ in recorder.calls for t in tensors.values() if t.nbytes >= 16]
            assert len(set(sent)) == len(sent), f"{recorder.name} got the same tensor twice"

    def test_every_job_is_closed_on_every_component(
        self, assemble: Assemble, info: ModelInfo, components: dict[str, Component]
    ) -> None:
        recorders = {layer.name: [Recorder(components[layer.name])] for layer in info.layers}
        model = assemble(**recorders)
        paint(model, self.request)
        with pytest.raises(Cancelled):
            paint(model, self.request, lambda: True)
        paint(model, self.request)
        jobs = {request for (recorder,) in recorders.values() for _, request, _, _, _ in recorder.calls}
        assert len(jobs) >= 2
        for (recorder,) in recorders.values():
            assert {request for _, request, _, _, _ in recorder.calls} <= set(recorder.closed)

    def test_components_refuse_methods_they_do_not_have(self, components: dict[str, Component]) -> None:
        for component in components.values():
            for method in ("", "no_such_method", "__init__", "shutdown"):
                with pytest.raises(StageError):
                    component.call(method, 1, {}, {}, {})
            component.close(12345)
            assert component.memory().weights > 0
