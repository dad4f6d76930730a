"""The image commands of the original's README, as printed there but for paths, hosts and trailing comments.

The cache of Hugging Face that they name holds the embedded emoji model in the place of Stable Diffusion 1.5: as real, and
small enough to paint in seconds.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

for needed in ("torch", "diffusers", "cake_sd", "cake_emoji", "cake_server", "cake_transport_tcp"):
    pytest.importorskip(needed, reason="the original's image commands need them all")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Spawn = Callable[..., Any]
Pick = Callable[[], str]

WORKER = r"""
cake-cli --model /path/to/hf/cache \        # The cache dir for huggingface models
         --mode worker \                    # run as worker
         --name wsl2_on_windows \           # worker name in topology file
         --model-type image-model \         # use image-model for SD, text-model or skip for LLM
         --topology topology.yml \          # topology
         --address 0.0.0.0:10128            # bind address
"""
MASTER = r"""
cake-cli --model /path/to/hf/cache \        # The cache dir for huggingface models
         --api 0.0.0.0:8080 \               # API bind address
         --model-type image-model \         # use image-model for SD, text-model or skip for LLM
         --topology topology.yml            # topology file
"""
CURL = r"""
curl http://master-ip:8080/api/v1/image \
  -H "Content-Type: application/json" \
  -d '{
    "image_args": {
      "sd-image-prompt": "An old man sitting on the chair at seaside",
      "sd-num-samples": 1,
      "sd-image-seed": 2439383
    }
}'
"""
TOPOLOGY = """
wsl2_on_windows:
  host: 192.168.1.2:10128
  description: NVIDIA RTX 4090 24GB
  layers:
  - unet

macbook:
  host: 192.168.1.3:10128
  description: Macbook M2
  layers:
  - clip
  - vae
"""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path) -> None:
    """`path/to/hf/cache` as Hugging Face's own tools would have filled it."""
    from cake_emoji.checkpoint import FOLDER

    repository = tmp_path / "path/to/hf/cache/hub/models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    shutil.copytree(FOLDER, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")


def shell(text: str) -> str:
    """A command as printed, without its trailing comments, its paths below the test's folder."""
    lines = [re.sub(r"\s+#\s.*$", "", line).rstrip() for line in text.strip().splitlines()]
    return "\n".join(lines).replace("/path/to/", "path/to/")


@pytest.mark.skipif(shutil.which("curl") is None, reason="the README's command needs curl")
def test_workers_master_and_curl(spawn: Spawn, free_address: Pick, tmp_path: Path) -> None:
    hosts = {"wsl2_on_windows": free_address(), "macbook": free_address()}
    topology = TOPOLOGY.replace("192.168.1.2:10128", hosts["wsl2_on_windows"])
    (tmp_path / "topology.yml").write_text(topology.replace("192.168.1.3:10128", hosts["macbook"]))
    commands = [shell(WORKER).replace("wsl2_on_windows", n).replace("0.0.0.0:10128", a) for n, a in hosts.items()]
    workers = [spawn(command) for command in commands]
    api = free_address()
    # At the size that the small model was made for: at that of Stable Diffusion it would paint for minutes.
    master = spawn(shell(MASTER).replace("0.0.0.0:8080", api) + " --sd-width 64 --sd-height 64")
    for worker in workers:
        worker.wait_for("listening on")
    master.wait_for("ready in")
    pictures = []
    for _ in range(2):
        curl = spawn(shell(CURL).replace("master-ip:8080", api).replace("curl ", "curl -sS ", 1))
        assert curl.wait() == 0, curl.output
        answer = json.loads(curl.output)
        assert "images" in answer, answer
        (picture,) = answer["images"]
        pictures.append(base64.b64decode(picture, validate=True))
    assert pictures[0].startswith(b"\x89PNG")
    # `sd-image-seed` counts here; in the original it was ignored.
    assert pictures[0] == pictures[1]


def test_one_image_with_the_originals_flags(spawn: Spawn, tmp_path: Path) -> None:
    flags = "--sd-use-f16 --sd-n-steps 4 --sd-num-samples 2 --sd-guidance-scale 4 --sd-seed 7 --sd-width 64 --sd-height 64"
    command = f"cake-cli --model path/to/hf/cache --model-type image-model {flags} --sd-image-prompt 'a red apple' --cpu"
    process = spawn(command)
    assert process.wait() == 0, process.output
    written = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert len(written) == 2
    assert all((tmp_path / "images" / name).read_bytes().startswith(b"\x89PNG") for name in written)
