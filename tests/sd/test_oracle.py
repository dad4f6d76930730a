"""Split over nodes or not: the same bits as the plain diffusers pipeline in one process."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cake_core.requests import ImageRequest
from cake_sd.components import to_pixels
from cake_sd.quiet import auto_pipeline

FAMILIES = ("sd15", "sd21", "sdxl", "turbo", "sd3", "flux", "pixart")
WITH_IMG2IMG = ("sd15", "sd21", "sdxl", "turbo", "sd3", "flux")
PROMPT, NEGATIVE = "a red apple", "grey"


def call_of(family: str, **extra: Any) -> dict[str, Any]:
    call = {"prompt": PROMPT, "num_inference_steps": 3, "guidance_scale": 0.0 if family == "turbo" else 5.0, **extra}
    if family in ("sd15", "sd21", "sdxl", "sd3", "pixart"):
        call["negative_prompt"] = NEGATIVE
    if family == "pixart":
        call["use_resolution_binning"] = False
    return call


def request_for(family: str, **extra: Any) -> ImageRequest:
    negative = NEGATIVE if "negative_prompt" in call_of(family) else ""
    return ImageRequest(
        PROMPT, negative, steps=3, guidance=0.0 if family == "turbo" else 5.0, seed=7, **{"width": 64, "height": 48, **extra}
    )


def image_and_png(width: int = 64, height: int = 48, mode: str = "RGB") -> tuple[Any, bytes]:
    from PIL import Image

    image = Image.new(mode, (width, height))
    for x in range(width):
        for y in range(height):
            value = (x * 4 % 256, y * 5 % 256, (x * y) % 256)
            image.putpixel((x, y), value if mode == "RGB" else 255 * (x > width // 2))
    file = io.BytesIO()
    image.save(file, "PNG")
    return image, file.getvalue()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_to_image_is_diffusers_bit_for_bit(
    kit: Any, model: Callable[[str], Path], cluster: Any, family: str, dtype: str
) -> None:
    folder = model(family)
    expected = kit.pictures(kit.plain(folder, dtype), 7, width=64, height=48, **call_of(family))
    for remote in ((), ("clip", "clip2", "clip3", "unet", "transformer", "vae")):
        assert cluster(folder, remote, dtype).paint(request_for(family)) == expected, f"remote: {remote}"


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("family", WITH_IMG2IMG)
def test_image_to_image_is_diffusers_bit_for_bit(
    kit: Any, model: Callable[[str], Path], cluster: Any, family: str, dtype: str
) -> None:
    folder = model(family)
    image, data = image_and_png()
    pipeline = kit.image_to_image(kit.plain(folder, dtype))
    size = {"width": 64, "height": 48} if family in ("flux", "sd3") else {}
    expected = kit.pictures(pipeline, 7, image=image, strength=0.7, **size, **call_of(family))
    request = request_for(family, init_image=data, strength=0.7)
    for remote in ((), ("clip", "clip2", "clip3", "unet", "transformer", "vae")):
        assert cluster(folder, remote, dtype).paint(request) == expected, f"remote: {remote}"


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_inpainting_is_diffusers_bit_for_bit(
    kit: Any, model: Callable[[str], Path], cluster: Any, family: str, dtype: str
) -> None:
    folder = model(family)
    image, data = image_and_png()
    mask, mask_data = image_and_png(mode="L")
    pipeline = auto_pipeline().AutoPipelineForInpainting.from_pipe(kit.plain(folder, dtype))
    pipeline.set_progress_bar_config(disable=True)
    expected = kit.pictures(pipeline, 7, image=image, mask_image=mask, strength=0.9, width=64, height=48, **call_of(family))
    request = request_for(family, init_image=data, mask=mask_data, strength=0.9)
    for remote in ((), ("clip", "clip2", "unet", "vae")):
        assert cluster(folder, remote, dtype).paint(request) == expected, f"remote: {remote}"


@pytest.mark.parametrize("remote", [("clip",), ("unet",), ("vae",), ("clip", "vae"), ("clip", "unet"), ("unet", "vae")])
def test_every_split_paints_the_same(kit: Any, model: Callable[[str], Path], cluster: Any, remote: tuple[str, ...]) -> None:
    folder = model("sd15")
    expected = kit.pictures(kit.plain(folder), 7, width=64, height=48, **call_of("sd15"))
    assert cluster(folder, remote).paint(request_for("sd15")) == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", [False, True])
def test_the_loop_beside_the_denoiser_is_the_same(
    kit: Any, model: Callable[[str], Path], cluster: Any, family: str, start: bool
) -> None:
    if start and family not in WITH_IMG2IMG:
        pytest.skip("no image-to-image pipeline")
    folder = model(family)
    request = request_for(family, **({"init_image": image_and_png()[1], "strength": 0.7} if start else {}))
    remote = ("unet", "transformer")
    stepwise, looping = cluster(folder, remote), cluster(folder, remote, loop="worker")
    assert looping.paint(request) == stepwise.paint(request)
    (wire,) = next(iter(looping.wires.values()))
    assert "forward" not in wire.methods
    assert wire.methods.count("loop_begin") == 1


def test_inpainting_in_a_loop_beside_the_denoiser(kit: Any, model: Callable[[str], Path], cluster: Any) -> None:
    request = request_for("sd15", init_image=image_and_png()[1], mask=image_and_png(mode="L")[1], strength=0.9)
    folder = model("sd15")
    assert cluster(folder, ("unet",), loop="worker").paint(request) == cluster(folder).paint(request)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux"])
def test_a_master_without_weights_is_enough(
    kit: Any, model: Callable[[str], Path], cluster: Any, tmp_path: Path, family: str
) -> None:
    folder = model(family)
    bare = kit.weightless(folder, tmp_path / "bare")
    assert not list(bare.rglob("*.safetensors"))
    everything = ("clip", "clip2", "clip3", "unet", "transformer", "vae")
    expected = cluster(folder).paint(request_for(family))
    assert cluster(folder, everything, master=bare).paint(request_for(family)) == expected


@pytest.mark.parametrize("clip_skip", [1, 2])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_clip_skip_takes_an_earlier_state(
    kit: Any, model: Callable[[str], Path], cluster: Any, family: str, clip_skip: int
) -> None:
    folder = model(family)
    pipeline = kit.plain(folder)
    if family == "sd15" and not hasattr(pipeline.text_encoder, "text_model"):
        # diffusers looks for the norm one level deeper than newer transformers have it
        object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    expected = kit.pictures(pipeline, 7, width=64, height=48, clip_skip=clip_skip, **call_of(family))
    request = request_for(family, extra={"clip_skip": clip_skip})
    for remote in ((), ("clip", "clip2")):
        assert cluster(folder, remote).paint(request) == expected
    assert cluster(folder).paint(request_for(family)) != expected


@pytest.mark.parametrize("name", ["ddim", "euler", "euler-ancestral", "heun", "dpm++", "unipc", "ddpm", "kdpm2", "pndm"])
def test_schedulers_are_those_of_diffusers(kit: Any, model: Callable[[str], Path], cluster: Any, name: str) -> None:
    import diffusers

    from cake_sd.versions import SCHEDULERS

    folder = model("sd15")
    pipeline = kit.plain(folder)
    pipeline.scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(pipeline.scheduler.config)
    expected = kit.pictures(pipeline, 7, width=64, height=48, **call_of("sd15"))
    assert cluster(folder, ("unet",)).paint(request_for("sd15", extra={"scheduler": name})) == expected


@pytest.mark.parametrize("parallel", ["images", "guidance"])
def test_several_images_are_each_their_seed(kit: Any, model: Callable[[str], Path], cluster: Any, parallel: str) -> None:
    folder = model("sd15")
    pipeline = kit.plain(folder)
    expected = [kit.pictures(pipeline, 7 + k, width=64, height=48, **call_of("sd15"))[0] for k in range(4)]
    made = cluster(folder, ("unet",), replicas={"unet": 2}, parallel=parallel)
    painted = made.paint(request_for("sd15", images=4))
    if parallel == "images":
        assert painted == expected
        calls = [wire.methods.count("forward") for wire in made.wires["unet"]]
        assert sum(calls) == 4 * 4
        assert min(calls) >= 4, "both replicas painted"
    else:
        assert [wire.methods.count("forward") for wire in made.wires["unet"]] == [4 * 4, 4 * 4]


@pytest.mark.parametrize(("remote", "node", "overlaps"), [
    (("vae",), "", True), (("unet", "vae"), "", True), (("unet",), "", True), (("unet", "vae"), "w0", False), ((), "", False),
])  # fmt: skip
def test_an_image_is_decoded_while_another_node_denoises_the_next(
    kit: Any, model: Callable[[str], Path], cluster: Any, remote: tuple[str, ...], node: str, overlaps: bool
) -> None:
    """The first picture is held back until the second one's denoising has begun, or until it is clear that it waits for it."""
    pipeline, folder = kit.plain(model("sd15")), model("sd15")
    expected = [kit.pictures(pipeline, 7 + k, width=64, height=48, **call_of("sd15"))[0] for k in range(3)]
    made = cluster(folder, remote, node=node)
    vae, unet = (made.components[layer][0] for layer in ("vae", "unet"))
    begun, forwards, met = threading.Event(), 0, []

    def count(method: str) -> None:
        nonlocal forwards
        forwards += method == "forward"
        if forwards == 5:  # of four an image
            begun.set()

    def hold(method: str) -> None:
        if method == "decode":
            met.append(begun.wait(10.0 if overlaps else 0.2))

    _before(unet, count)
    _before(vae, hold)
    assert made.paint(request_for("sd15", images=3)) == expected
    assert met[0] == overlaps


def _before(component: Any, told: Callable[[str], None]) -> None:
    """Has a component, here or elsewhere, tell of each call of it."""
    if hasattr(component, "before"):
        component.before = told
        return
    run = component.run

    def telling(method: str, *rest: Any) -> Any:
        told(method)
        return run(method, *rest)

    component.run = telling


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "pixart"])
def test_halves_of_guidance_on_two_nodes_change_rounding_only(
    model: Callable[[str], Path], cluster: Any, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Two batches of one instead of one of two: the pictures, before they are rounded to 8 bits, differ by less than 1e-5."""
    import torch

    decoded: list[torch.Tensor] = []
    monkeypatch.setattr("cake_sd.components.to_pixels", lambda image: decoded.append(image.clone()) or to_pixels(image))
    denoiser = "unet" if family in ("sd15", "sdxl") else "transformer"
    request = replace(request_for(family), steps=20)
    made = cluster(model(family), (denoiser,), replicas={denoiser: 2}, parallel="guidance")
    made.paint(request)
    calls = [wire.methods.count("forward") for wire in made.wires[denoiser]]
    assert calls[0] == calls[1] > 0
    cluster(model(family), (denoiser,)).paint(request)
    halves, whole = decoded
    assert float((halves - whole).abs().max()) <= 1e-5


def test_a_batch_is_what_diffusers_makes_of_a_batch(kit: Any, model: Callable[[str], Path], cluster: Any) -> None:
    import torch

    folder = model("sd15")
    generators = [torch.Generator("cpu").manual_seed(7 + k) for k in range(3)]
    expected = kit.plain(folder)(
        generator=generators, num_images_per_prompt=3, width=64, height=48, output_type="pil", **call_of("sd15")
    )
    painted = cluster(folder, ("unet", "vae")).paint(request_for("sd15", images=3, extra={"batch": 3}))
    assert painted == [image.tobytes() for image in expected.images]


def test_flux_with_a_negative_prompt_guides_by_it(kit: Any, model: Callable[[str], Path], cluster: Any) -> None:
    folder = model("flux")
    call = call_of("flux", negative_prompt=NEGATIVE, true_cfg_scale=3.0, guidance_scale=3.0)
    expected = kit.pictures(kit.plain(folder), 7, width=64, height=48, **call)
    request = ImageRequest(PROMPT, NEGATIVE, steps=3, guidance=3.0, seed=7, width=64, height=48)
    for options in ({}, {"loop": "worker"}):
        assert cluster(folder, ("transformer", "vae"), **options).paint(request) == expected
