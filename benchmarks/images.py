"""What splitting an image model costs and brings, on one machine: `python benchmarks/images.py overhead|replicas`.

overhead   a step whose unet is in another process, over TCP on loopback, beside the same step in this process: the latents
           and embeddings of SDXL at 1024 x 1024, a unet that computes little. Runs take turns; medians of the steps.
replicas   four images on one worker and on two, one thread each, with a unet that computes for at least half a second.

Exits with 1 when a bound of docs/performance.md is missed. Needs cake-sd and cake-transport-tcp installed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cake_core.events import ImageDone, ImageStep
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.links.connect import Connector, Keyring
from cake_core.model import LoadOptions
from cake_core.plugins import Plugins
from cake_core.requests import ImageRequest
from cake_core.runtime import ImageRuntime, RunSpec, open_image
from cake_core.topology import parse_topology
from cake_sd.quiet import quieten
from cake_sd.shapes import END, START, write_tokenizer

OVERHEAD_MS, REPLICAS_SHARE, CALL_SECONDS = 4.0, 0.6, 0.5


def make_model(folder: Path, widths: tuple[int, ...], size: int) -> None:
    """A Stable Diffusion of random weights: a unet of these widths for `size` latents a side, everything else tiny."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*letters, *(f"{x}</w>" for x in letters), START, END))}
    write_tokenizer(folder / "words", vocab, "#version: 0.2\n", END)
    text = CLIPTextConfig(
        vocab_size=514, hidden_size=2048, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, bos_token_id=512,
        eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=size, block_out_channels=widths, layers_per_block=2, cross_attention_dim=2048, norm_num_groups=8,
        attention_head_dim=4, down_block_types=("DownBlock2D",) * (len(widths) - 1) + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * (len(widths) - 1),
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8, 8), norm_num_groups=8, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        text_encoder=CLIPTextModel(text), tokenizer=CLIPTokenizer.from_pretrained(str(folder / "words")), unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


@contextlib.contextmanager
def worker(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """A process that serves the unet with one thread; its entry in a topology."""
    (folder.parent / f"{name}.yml").write_text(f"{name}: {{host: '127.0.0.1:1', layers: [unet]}}\n")
    command = [sys.executable, "-m", "cake_core", "worker", "--model", str(folder), "--model-type", "image", "--insecure"]
    command += ["--topology", str(folder.parent / f"{name}.yml"), "--address", "127.0.0.1:0", "--threads", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CAKE_PLUGINS": "sd,tcp"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            output = iter(process.stdout.readline, "")
            port = next(found[1] for line in output if (found := re.search(r"listening on tcp://127\.0\.0\.1:(\d+)", line)))
            yield {"host": f"127.0.0.1:{port}", "layers": ["unet"]}
        finally:
            process.terminate()


@contextlib.contextmanager
def opened(folder: Path, entries: dict[str, Any]) -> Iterator[ImageRuntime]:
    plugins = Plugins()
    dial = Connector(plugins, Keyring(None, folder, True, lambda _key: None)).dial
    options = LoadOptions(dtype="f32", device="cpu", threads=1)
    runtime = open_image(plugins, RunSpec(DiffusersCheckpoint(folder), parse_topology(entries), options, dial, wait=60.0))
    try:
        yield runtime
    finally:
        runtime.close()


def paint(runtime: ImageRuntime, request: ImageRequest) -> tuple[float, list[float]]:
    """Seconds in all, and of each step but each image's first, which encodes the prompt."""
    started = time.perf_counter()
    events = list(runtime.engine.generate(request))
    seconds = time.perf_counter() - started
    assert sum(isinstance(event, ImageDone) for event in events) == request.images
    return seconds, [event.seconds for event in events if isinstance(event, ImageStep) and event.step > 1]


def overhead(folder: Path, runs: int) -> bool:
    make_model(folder, (8, 8, 8), 128)
    request = ImageRequest("a cake", width=1024, height=1024, steps=30, guidance=5.0, seed=1)
    with worker(folder, "w0") as entry, opened(folder, {}) as here, opened(folder, {"w0": entry}) as there:
        for runtime in (here, there):
            paint(runtime, ImageRequest("a cake", width=1024, height=1024, steps=3, seed=1))
        pairs = [(paint(here, request)[1], paint(there, request)[1]) for _ in range(runs)]
        local, remote = ([step for pair in pairs for step in pair[side]] for side in (0, 1))
    mine, theirs = 1000 * statistics.median(local), 1000 * statistics.median(remote)
    print(f"step here {mine:.2f} ms, on a worker {theirs:.2f} ms: {theirs - mine:+.2f} ms (bound {OVERHEAD_MS:g})")
    return theirs - mine <= OVERHEAD_MS


def replicas(folder: Path, runs: int) -> bool:
    make_model(folder, (128, 256, 512), 48)
    request = ImageRequest("a cake", width=384, height=384, steps=3, guidance=5.0, seed=1, images=4)
    with (
        worker(folder, "w0") as first,
        worker(folder, "w1") as second,
        opened(folder, {"w0": first}) as one,
        opened(folder, {"w0": first, "w1": second}) as two,
    ):
        call = statistics.median(paint(one, ImageRequest("a cake", width=384, height=384, steps=3, seed=1))[1])
        pairs = [(paint(one, request)[0], paint(two, request)[0]) for _ in range(runs)]
    alone, shared = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
    share = statistics.median(b / a for a, b in pairs)
    print(f"a call of the unet {call:.2f} s (at least {CALL_SECONDS:g}); 4 images on one worker {alone:.2f} s, on two "
          f"{shared:.2f} s: {share:.3f} of it (bound {REPLICAS_SHARE:g})")  # fmt: skip
    return share <= REPLICAS_SHARE and call >= CALL_SECONDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "replicas"))
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quieten()
    with tempfile.TemporaryDirectory() as folder:
        met = {"overhead": overhead, "replicas": replicas}[arguments.what](Path(folder) / "model", arguments.runs)
    sys.exit(not met)


if __name__ == "__main__":
    main()
