"""Images: OpenAI's endpoints, the seed's, events, and what is refused."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import pytest

from cake_core import png
from cake_core.errors import RequestError
from cake_core.runtime import ImageRuntime, TextRuntime
from cake_server.images.params import decode_image, openai_request, parse_size, seed_request
from cake_server.schemas.images import ImageArgs, ImageGeneration
from cake_server.settings import Settings

PATH = "/v1/images/generations"


def events(text: str) -> list[tuple[str, Any]]:
    found = []
    for block in text.strip().split("\n\n"):
        lines = block.split("\n")
        if lines[0].startswith("event: "):
            found.append((lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: "))))
    return found


def test_images_are_pngs_with_their_seeds(image_api: httpx.Client) -> None:
    body = image_api.post(PATH, json={"prompt": "x", "n": 2, "seed": 5, "size": "64x32"}).raise_for_status().json()
    files = [base64.b64decode(item["b64_json"]) for item in body["data"]]
    assert [png.size(file) for file in files] == [(64, 32), (64, 32)]
    assert [item["seed"] for item in body["data"]] == [5, 6]
    assert files[0] != files[1]
    assert (body["size"], body["output_format"], body["timings"]["steps"]) == ("64x32", "png", 8)
    again = image_api.post(PATH, json={"prompt": "x", "seed": 6, "size": "64x32"}).json()
    assert base64.b64decode(again["data"][0]["b64_json"]) == files[1], "a seed gives its image again, alone or as the second"


def test_one_image_can_be_asked_for_as_a_file(image_api: httpx.Client) -> None:
    response = image_api.post(PATH, json={"prompt": "x"}, headers={"accept": "image/png"})
    assert response.headers["content-type"] == "image/png"
    assert png.size(response.content) == (64, 64)


def test_a_stream_shows_previews_steps_and_the_image(image_api: httpx.Client) -> None:
    body = {"prompt": "x", "steps": 8, "seed": 1, "stream": True, "partial_images": 3, "progress": True}
    found = events(image_api.post(PATH, json=body).raise_for_status().text)
    names = [name for name, _ in found]
    assert names.count("image.progress") == 8
    partial = [data for name, data in found if name == "image_generation.partial_image"]
    assert [data["partial_image_index"] for data in partial] == [0, 1, 2]
    name, last = found[-1]
    assert name == last["type"] == "image_generation.completed"
    whole = image_api.post(PATH, json={"prompt": "x", "steps": 8, "seed": 1}).json()
    assert last["b64_json"] == whole["data"][0]["b64_json"]


def test_the_seeds_request_works_and_its_readmes_seed_seeds(image_api: httpx.Client) -> None:
    args = {"sd-image-prompt": "An old man sitting on the chair at seaside", "sd-num-samples": 1, "sd-image-seed": 2439383}
    first = image_api.post("/api/v1/image", json={"image_args": args}).raise_for_status().json()
    assert list(first) == ["images"]
    assert png.size(base64.b64decode(first["images"][0])) == (64, 64)
    assert image_api.post("/api/v1/image", json={"image_args": args}).json() == first
    other = image_api.post("/api/v1/image", json={"image_args": {**args, "sd-image-seed": 1}}).json()
    assert other != first


def test_intermediary_images_stand_before_the_one_they_become(image_api: httpx.Client) -> None:
    args = {"sd-num-samples": 2, "sd-n-steps": 4, "sd-intermediary-images": 2, "sd-seed": 3}
    images = image_api.post("/api/v1/image", json={"image_args": args}).json()["images"]
    assert len(images) == 4
    finals = image_api.post("/api/v1/image", json={"image_args": {**args, "sd-intermediary-images": 0}}).json()["images"]
    assert [images[1], images[3]] == finals


def test_empty_image_args_paint_the_seeds_default(image_api: httpx.Client) -> None:
    assert len(image_api.post("/api/v1/image", json={"image_args": {}}).json()["images"]) == 1
    assert image_api.post("/api/v1/image", json={}).status_code == 400


def test_the_seeds_endpoint_streams_too(image_api: httpx.Client) -> None:
    args = {"sd-n-steps": 4, "sd-intermediary-images": 2, "stream": True}
    names = [name for name, _ in events(image_api.post("/api/v1/image", json={"image_args": args}).text)]
    assert names.count("image.progress") == 4
    assert names[-1] == "image_generation.completed"


def test_edits_hand_over_image_and_mask(image_api: httpx.Client) -> None:
    picture = png.encode(bytes(64 * 64 * 3), 64, 64)
    files = {"image": ("a.png", picture), "mask": ("m.png", picture)}
    response = image_api.post("/v1/images/edits", files=files, data={"prompt": "x", "n": "1", "strength": "0.5"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "init_image", "the toy itself refuses it, so it has come that far"
    missing = image_api.post("/v1/images/edits", files={"mask": ("m.png", picture)}, data={"prompt": "x"})
    assert missing.json()["error"]["param"] == "image"
    wrong = image_api.post("/v1/images/edits", files={"image": ("a.png", picture)}, data={"prompt": "x", "n": "two"})
    assert wrong.json()["error"]["param"] == "n"
    assert image_api.post("/v1/images/edits", json={"prompt": "x"}).status_code == 400
    broken = image_api.post("/v1/images/edits", content=b"garbage", headers={"content-type": "multipart/form-data; boundary=x"})
    assert broken.status_code == 400


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"size": "big"}, "size"),
        ({"size": "63x64"}, "width"),
        ({"size": "99999x99999"}, "width"),
        ({"size": "8000x8000"}, "size"),
        ({"response_format": "url"}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"background": "transparent"}, "background"),
        ({"partial_images": 9}, "partial_images"),
        ({"steps": 0}, "steps"),
        ({"steps": 100000}, "steps"),
        ({"seed": -7}, "seed"),
        ({"strength": 2}, "strength"),
        ({"guidance_scale": 1e30}, "guidance_scale"),
        ({"prompt": "x" * 40_000}, "prompt"),
    ],
)
def test_wrong_fields_are_named(image_api: httpx.Client, change: dict[str, Any], param: str) -> None:
    response = image_api.post(PATH, json={"prompt": "x", **change})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_each_model_has_its_endpoints(start: Any, runtime: TextRuntime, image_runtime: ImageRuntime) -> None:
    text, image = start(runtime), start(image_runtime)
    calls = [
        (image, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        (text, PATH, {"prompt": "x"}),
        (text, "/api/v1/image", {"image_args": {}}),
    ]
    for server, path, body in calls:
        response = httpx.post(server.url + path, json=body)
        assert response.status_code == 501
        assert response.json()["error"]["code"] == "wrong_model_type"


def test_paths_on_the_servers_disk_are_not_read() -> None:
    with pytest.raises(RequestError, match="paths are not read"):
        seed_request(ImageArgs(img2img="/etc/passwd"), Settings())
    assert decode_image("data:image/png;base64,aGk=", "x") == b"hi"


def test_all_of_the_seeds_keys() -> None:
    args = ImageArgs(
        image_prompt="p", uncond_prompt="n", tracing=True, n_steps=7, num_samples=2, bsize=3, intermediary_images=4,
        guidance_scale=1.5, img2img_strength=0.5, seed=9, width=64, height=32, scheduler="ddim", clip_skip=1,
    )  # fmt: skip
    request = seed_request(args, Settings())
    assert (request.prompt, request.negative_prompt, request.steps, request.images) == ("p", "n", 7, 6)
    assert (request.preview_every, request.guidance, request.strength, request.seed) == (4, 1.5, 0.5, 9)
    assert (request.width, request.height) == (64, 32)
    assert request.extra == {"batch": 3, "scheduler": "ddim", "clip_skip": 1, "trace": True}


def test_sizes() -> None:
    assert parse_size("auto") == parse_size(None) == (None, None)
    assert parse_size("512x768") == (512, 768)
    assert openai_request(ImageGeneration(prompt="x", cfg_scale=3.0, num_inference_steps=4), Settings()).guidance == 3.0
