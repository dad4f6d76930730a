"""Every text command of the original's README, as printed there but for paths, hosts and trailing comments."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cake_core.testing.toys import write_toy_checkpoint

pytest.importorskip("cake_server", reason="the original's API needs cake-server")

Spawn = Callable[..., Any]
Pick = Callable[[], str]

WORKER = r"""
cake-cli --model /path/to/Meta-Llama-3-8B \ # model path, read below on how to optimize model size for workers
         --mode worker \                    # run as worker
         --name worker0 \                   # worker name in topology file
         --topology topology.yml \          # topology
         --address 0.0.0.0:10128            # bind address
"""
MASTER = r"""
cake-cli --model /path/to/Meta-Llama-3-8B \ # model path
         --api 0.0.0.0:8080               \ # API bind address
         --topology topology.yml            # topology file
"""
SINGLE = r"""
cake-cli --model /path/to/Meta-Llama-3-8B \ # model path
         --api 0.0.0.0:8080                # API bind address
"""
SPLIT = r"""
cake-split-model --model-path path/to/Meta-Llama-3-8B \ # source model to split
                 --topology path/to/topology.yml \      # topology file
                 --output output-folder-name            # output folder where all the workers data bundles will be saved
"""
CHAT = r"""
curl http://master-ip:8080/api/v1/chat/completions \
  -H "Content-Type: application/json" \
  -d '{
    "messages": [
        {
            "role": "system",
            "content": "You are a helpful AI assistant."
        },
        {
            "role": "user",
            "content": "Why is the sky blue?"
        }
    ]
}'
"""
TOPOLOGY = """
linux_server_1:
  host: 'linux_server.host:10128'
  description: 'NVIDIA Titan X Pascal (12GB)'
  layers:
    - 'model.layers.0-5'

linux_server_2:
  host: 'linux_server2.host:10128'
  description: 'NVIDIA GeForce 3080 (10GB)'
  layers:
    - 'model.layers.6-16'

iphone:
  host: 'iphone.host:10128'
  description: 'iPhone 15 Pro Max'
  layers:
    - 'model.layers.17'

ipad:
  host: 'ipad.host:10128'
  description: 'iPad'
  layers:
    - 'model.layers.18-19'

macbook:
  host: 'macbook.host:10128'
  description: 'M1 Max'
  layers:
    - 'model.layers.20-31'
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with the 32 layers that the README's topology speaks of."""
    folder = tmp_path / "path" / "to" / "Meta-Llama-3-8B"
    write_toy_checkpoint(folder, layers=32)
    return folder


def shell(text: str) -> str:
    """A command as printed, without its trailing comments, its paths below the test's folder."""
    lines = [re.sub(r"\s+#\s.*$", "", line).rstrip() for line in text.strip().splitlines()]
    return "\n".join(lines).replace("/path/to/", "path/to/")


def ask(spawn: Spawn, address: str) -> str:
    """The answer of the README's curl."""
    process = spawn(shell(CHAT).replace("master-ip:8080", address).replace("curl ", "curl -sS ", 1))
    assert process.wait() == 0, process.output
    answer = json.loads(process.output)
    assert answer["object"] == "chat.completion"
    content = answer["choices"][0]["message"]["content"]
    assert isinstance(content, str)
    return content


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="the README's command needs curl")


@needs_curl
def test_worker_and_master_and_curl(spawn: Spawn, free_address: Pick, model: Path, tmp_path: Path) -> None:
    hosts = {name: free_address() for name in ("linux_server_1", "linux_server_2")}
    topology = TOPOLOGY.split("\niphone:")[0].replace("linux_server.host:10128", hosts["linux_server_1"])
    (tmp_path / "topology.yml").write_text(topology.replace("linux_server2.host:10128", hosts["linux_server_2"]))
    for name, address in hosts.items():
        spawn(shell(WORKER).replace("worker0", name).replace("0.0.0.0:10128", address)).wait_for("listening on")
    api = free_address()
    master = spawn(shell(MASTER).replace("0.0.0.0:8080", api))
    single_api = free_address()
    single = spawn(shell(SINGLE).replace("0.0.0.0:8080", single_api))
    master.wait_for("ready in")
    single.wait_for("ready in")
    answers = {ask(spawn, api), ask(spawn, single_api), ask(spawn, api)}
    # The original's seed: the same question has the same answer, wherever the layers are.
    assert len(answers) == 1


def test_a_worker_that_the_topology_does_not_name(spawn: Spawn, model: Path, tmp_path: Path) -> None:
    (tmp_path / "topology.yml").write_text(TOPOLOGY)
    process = spawn(shell(WORKER))
    assert process.wait() == 2
    assert "has no node 'worker0'" in process.output
    assert "Traceback" not in process.output


def test_a_worker_without_a_name(spawn: Spawn, model: Path, tmp_path: Path) -> None:
    (tmp_path / "topology.yml").write_text(TOPOLOGY)
    process = spawn("cake-cli --mode worker --model path/to/Meta-Llama-3-8B --topology topology.yml")
    assert process.wait() == 2
    assert "no --name provided for worker" in process.output


def test_split_and_start_a_worker_on_its_bundle(spawn: Spawn, free_address: Pick, model: Path, tmp_path: Path) -> None:
    (tmp_path / "path" / "to" / "topology.yml").write_text(TOPOLOGY)
    process = spawn(shell(SPLIT))
    assert process.wait() == 0, process.output
    bundle = tmp_path / "output-folder-name" / "iphone-node"
    assert (bundle / "topology.yml").is_file()
    assert (bundle / "model" / "reduced.safetensors").is_file()
    assert (bundle / "model" / "config.json").is_file()
    worker = spawn(
        f"cake-cli --model output-folder-name/iphone-node/model --mode worker --name iphone "
        f"--topology output-folder-name/iphone-node/topology.yml --address {free_address()}"
    )
    worker.wait_for("listening on")
    assert "model.layers.17: " in worker.output


def test_one_generation_with_the_originals_defaults(spawn: Spawn, model: Path) -> None:
    process = spawn("cake-cli --model path/to/Meta-Llama-3-8B")
    assert process.wait() == 0, process.output
    assert "seed 299792458" in process.output
    again = spawn("cake-cli --model path/to/Meta-Llama-3-8B --prompt 'The sky is blue because ' --seed 299792458 2>/dev/null")
    assert again.wait() == 0
    assert again.output.strip() in process.output
