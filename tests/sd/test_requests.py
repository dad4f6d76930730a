"""What a request may ask for, what it gets when it asks for nothing, and what it is told when it asks wrongly."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cake_core import png
from cake_core.errors import ConfigError, RequestError
from cake_core.events import ImageDone, ImagePreview, ImageStep, ImageWarning
from cake_core.model import LoadOptions
from cake_core.requests import ImageRequest
from cake_sd.options import process_options
from cake_sd.plan import make_plan

LONG = " ".join(f"word{index} apple" for index in range(60))


def _picture(width: int = 64, height: int = 48, mode: str = "RGB", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert(mode).save(file, kind)
    return file.getvalue()


def _plan(made: Any, request: ImageRequest) -> Any:
    painter = made.painter
    return make_plan(request, painter._lanes[0], painter._checkpoint, painter._sd)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"extra": {"schedular": "ddim"}}, "did you mean 'scheduler'"),
        ({"extra": {"scheduler": "dimm"}}, "scheduler must be one of ddim"),
        ({"extra": {"clip_skip": -1}}, "clip_skip must be a whole number"),
        ({"extra": {"clip_skip": 9}}, "has 3 layers"),
        ({"extra": {"version": "xl"}}, "the model that is served is no xl; leave version out"),
        ({"extra": {"batch": 99}}, "batch must be a whole number from 1 to 16"),
        ({"extra": {"long_prompts": "maybe"}}, "long_prompts must be true or false"),
        ({"extra": {"scheduler": "flow-euler"}}, "does not fit this model"),
        ({"width": 68, "height": 64}, "multiple of 8"),
        ({"init_image": b"no picture"}, "init_image is not a picture"),
        ({"init_image": _picture()[:60]}, "init_image is not a picture"),
        ({"mask": _picture(mode="L")}, "a mask needs the image"),
        ({"init_image": _picture(), "mask": b"?"}, "mask is not a picture"),
        ({"init_image": _picture(), "strength": 0.1}, "less than one step"),
    ],
)
def test_wrong_requests_say_what_is_wrong(model: Any, cluster: Any, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        cluster(model("sd15")).paint(ImageRequest("apple", **{"width": 64, "height": 64, "steps": 3, **asked}))


def test_what_a_pipeline_does_not_have_is_refused(model: Any, cluster: Any) -> None:
    pixart = cluster(model("pixart"))
    with pytest.raises(RequestError, match="PixArtAlphaPipeline has no img2img"):
        pixart.paint(ImageRequest("apple", init_image=_picture(), steps=3))
    with pytest.raises(RequestError, match="has no clip_skip"):
        pixart.paint(ImageRequest("apple", width=64, height=64, steps=3, extra={"clip_skip": 1}))


def test_a_picture_that_claims_a_huge_size_is_not_decoded(model: Any, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cake_sd.inputs.MAX_PIXELS", 1000)
    with pytest.raises(RequestError, match="64 x 48 pixels"):
        cluster(model("sd15")).paint(ImageRequest("apple", init_image=_picture(), steps=3))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_start_images_of_the_usual_formats(model: Any, cluster: Any, kind: str) -> None:
    events = cluster(model("sd15")).events(ImageRequest("apple", init_image=_picture(70, 53, kind=kind), steps=3))
    (done,) = [event for event in events if isinstance(event, ImageDone)]
    assert (done.width, done.height) == (64, 48)


def test_a_transparent_mask_paints_where_it_is_clear(model: Any, cluster: Any) -> None:
    clear = Image.new("RGBA", (64, 48), (0, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (32, 0, 64, 48))
    white = Image.new("L", (64, 48), 0)
    white.paste(255, (32, 0, 64, 48))
    painted = []
    for mask in (clear, white):
        file = io.BytesIO()
        mask.save(file, "PNG")
        request = ImageRequest("apple", init_image=_picture(), mask=file.getvalue(), steps=3, strength=1.0)
        painted.append(cluster(model("sd15")).paint(request))
    assert painted[0] == painted[1]


def test_a_long_prompt_is_cut_with_a_warning_that_shows_what_was_cut(kit: Any, model: Any, cluster: Any) -> None:
    events = cluster(model("sd15")).events(ImageRequest(LONG, width=64, height=64, steps=2, seed=1))
    (warning,) = [event.message for event in events if isinstance(event, ImageWarning)]
    assert "the prompt is longer than 77 tokens; cut off: " in warning
    cut = warning.partition("cut off: '")[2].partition("'.")[0]
    assert LONG.endswith(cut)
    tokenizer = kit.plain(model("sd15")).tokenizer
    assert len(tokenizer(LONG.removesuffix(cut)).input_ids) == 77, "and nothing that is painted is called cut off"
    expected = kit.pictures(kit.plain(model("sd15")), 1, prompt=LONG, width=64, height=64, num_inference_steps=2)
    assert [event.rgb for event in events if isinstance(event, ImageDone)] == expected
    assert not [e for e in cluster(model("sd15")).events(ImageRequest("apple", width=64, height=64, steps=2))
                if isinstance(e, ImageWarning)]  # fmt: skip


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_long_prompts_are_encoded_in_chunks(kit: Any, model: Any, cluster: Any, family: str) -> None:
    from cake_sd.inputs import chunks

    folder = model(family)
    pipeline = kit.plain(folder)
    pieces = chunks(pipeline.tokenizer, LONG)
    assert len(pieces) > 2
    assert " ".join(pieces) == LONG
    parts = [pipeline.encode_prompt(piece, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True,
                                    negative_prompt="grey" if index == 0 else "")
             for index, piece in enumerate(pieces)]  # fmt: skip
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    joined = {
        name: torch.cat(values, dim=1) if values[0].ndim == 3 else values[0]
        for name, values in zip(names, zip(*parts, strict=True), strict=False)
    }
    expected = kit.pictures(pipeline, 1, width=64, height=64, num_inference_steps=2, guidance_scale=5.0, **joined)
    request = ImageRequest(LONG, "grey", 64, 64, steps=2, guidance=5.0, seed=1, extra={"long_prompts": True})
    for remote, options in (((), {}), (("clip", "clip2", "unet"), {"loop": "worker"})):
        events = cluster(folder, remote, **options).events(request)
        assert [event.rgb for event in events if isinstance(event, ImageDone)] == expected
        assert not [event for event in events if isinstance(event, ImageWarning)]
    with pytest.raises(RequestError, match="long prompts are not for FluxPipeline"):
        cluster(model("flux")).paint(ImageRequest(LONG, width=64, height=64, steps=2, extra={"long_prompts": True}))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"sd_versoin": "xl"}, "did you mean 'sd_version'"),
        ({"sd_version": "v3"}, "--sd-version must be one of v1-5, v2-1, xl, turbo"),
        ({"sd_width": 100}, "--sd-width must be a multiple of 8"),
        ({"sd_loop": "moon"}, "--sd-loop must be one of"),
        ({"sd_unet": "/nowhere/unet.safetensors"}, "--sd-unet must be a file that exists"),
        ({"sd_lora": ("/nowhere/l.safetensors=0.5",)}, "there is no file /nowhere"),
        ({"sd_use_f16": 3}, "--sd-use-f16 must be true or false"),
    ],
)
def test_wrong_options_of_the_process_say_what_is_wrong(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        process_options(LoadOptions(extra=extra))


def test_options_of_the_process_are_read() -> None:
    read = process_options(
        LoadOptions(extra={"sd_version": "xl", "use_f16": "true", "sd_clip_skip": "2", "sd_use_flash_attention": True})
    )
    assert (read.version, read.use_f16, read.clip_skip, read.loop, read.parallel) == ("xl", True, 2, "master", "images")


def _as_version(source: Path, target: Path, width: int) -> Path:
    """A weightless copy whose text conditioning claims to be as wide as a real version's."""
    shutil.copytree(source, target)
    config = json.loads((target / "unet/config.json").read_text())
    (target / "unet/config.json").write_text(json.dumps({**config, "cross_attention_dim": width}))
    return target


@pytest.mark.parametrize(
    ("version", "family", "size", "steps", "guidance", "scheduler"),
    [
        ("v1-5", "sd15", 512, 30, 7.5, "DDIMScheduler"),
        ("v2-1", "sd21", 768, 30, 7.5, "DDIMScheduler"),
        ("xl", "sdxl", 1024, 30, 7.5, "DDIMScheduler"),
        ("turbo", "turbo", 512, 1, 0.0, "EulerAncestralDiscreteScheduler"),
    ],
)
def test_versions_have_the_defaults_of_the_seed(
    model: Any, cluster: Any, tmp_path: Path, version: str, family: str, size: int, steps: int, guidance: float, scheduler: str
) -> None:
    from cake_sd.versions import VERSIONS

    claimed = _as_version(model(family), tmp_path / version, VERSIONS[version].cross_attention)
    shutil.copy(model(family) / "unet/config.json", tmp_path / "own.json")
    made = cluster(model(family))
    painter = made.painter
    painter._sd = process_options(LoadOptions(extra={"sd_version": version}))
    with pytest.raises(ConfigError, match=f"the model is no {version}"):
        _plan(made, ImageRequest("apple"))
    unet = painter._lanes[0].base.unet
    unet.register_to_config(cross_attention_dim=json.loads((claimed / "unet/config.json").read_text())["cross_attention_dim"])
    plan = _plan(made, ImageRequest("apple"))
    assert (plan.width, plan.height) == (size, size)
    assert (plan.call["num_inference_steps"], plan.call["guidance_scale"]) == (steps, guidance)
    made_scheduler = painter._lanes[0].pipeline("text2img", plan.scheduler).scheduler
    assert type(made_scheduler).__name__ == scheduler
    assert made_scheduler.config.timestep_spacing == ("trailing" if version == "turbo" else "leading")
    asked = _plan(made, ImageRequest("apple", width=64, height=72, steps=5, guidance=2.0))
    assert (asked.width, asked.height, asked.call["num_inference_steps"], asked.call["guidance_scale"]) == (64, 72, 5, 2.0)
    with pytest.raises(RequestError, match=f"this cluster serves {version}"):
        _plan(made, ImageRequest("apple", extra={"version": "xl" if version != "xl" else "turbo"}))


def test_a_model_without_a_version_gets_its_own_defaults(model: Any, cluster: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model("sd15"), tmp_path / "m"))
    plan = _plan(cluster(folder), ImageRequest("apple"))
    assert (plan.width, plan.height) == (64, 64), "16 latents of 4 pixels"
    assert "num_inference_steps" not in plan.call, "left to the pipeline"
    (folder / "generation_config.json").write_text('{"num_inference_steps": 9, "guidance_scale": 2.5}')
    plan = _plan(cluster(folder), ImageRequest("apple"))
    assert (plan.call["num_inference_steps"], plan.call["guidance_scale"]) == (9, 2.5)
    plan = _plan(cluster(folder, width=48, height=40), ImageRequest("apple", width=56))
    assert (plan.width, plan.height) == (56, 40)


@pytest.mark.parametrize(("scheduler", "steps", "total"), [("ddim", 4, 4), ("heun", 4, 7), ("pndm", 4, 5), ("euler", 4, 4)])
def test_steps_are_counted_as_the_scheduler_makes_them(
    model: Any, cluster: Any, scheduler: str, steps: int, total: int
) -> None:
    request = ImageRequest("apple", width=64, height=64, steps=steps, images=2, extra={"scheduler": scheduler})
    events = [event for event in cluster(model("sd15")).events(request) if isinstance(event, ImageStep)]
    assert [(event.image, event.step, event.steps) for event in events] == [
        (image, step, total) for image in range(2) for step in range(1, total + 1)
    ]


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("loop", ["master", "worker"])
def test_the_last_preview_is_the_picture(model: Any, cluster: Any, family: str, loop: str) -> None:
    """Decoded previews undo each pipeline's own scaling of the latents: the last estimate is the picture itself."""
    request = ImageRequest("apple", width=64, height=48, steps=4, preview_every=4, seed=2)
    events = cluster(model(family), ("unet", "transformer", "vae"), loop=loop).events(request)
    (preview,) = [event for event in events if isinstance(event, ImagePreview)]
    (done,) = [event for event in events if isinstance(event, ImageDone)]
    width, height, rgb = png.decode(preview.png)
    assert (width, height) == (done.width, done.height)
    worst = max(abs(a - b) for a, b in zip(rgb, done.rgb, strict=True))
    assert worst <= 1


def test_fast_previews_are_small_and_learn_the_colours(cluster: Callable[..., Any]) -> None:
    emoji = Path(__file__).parents[2] / "plugins/cake_emoji/src/cake_emoji/model"
    made = cluster(emoji, ("vae",))
    request = ImageRequest("a red apple", steps=8, seed=3, preview_every=8, extra={"preview": "fast"})
    first = made.events(request)
    calls = made.wires["vae"][0].methods.count("decode")
    second = made.events(request)
    assert made.wires["vae"][0].methods.count("decode") == calls + 1, "once a picture is known, previews cost no decoding"
    (done,) = [event for event in second if isinstance(event, ImageDone)]
    assert [event.rgb for event in first if isinstance(event, ImageDone)] == [done.rgb]
    (preview,) = [event for event in second if isinstance(event, ImagePreview)]
    width, height, rgb = png.decode(preview.png)
    assert (width, height) == (16, 16)
    small = Image.frombytes("RGB", (64, 64), done.rgb).resize((16, 16), Image.Resampling.BOX).tobytes()
    mean = sum(abs(a - b) for a, b in zip(rgb, small, strict=True)) / len(rgb)
    assert mean < 30
