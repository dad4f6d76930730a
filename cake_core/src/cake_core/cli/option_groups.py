"""The options that every command which loads a model takes, by groups: one declaration each. `options` hands them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import click

from cake_core.cli.sections import F, option

MODEL_TYPES = {"text": "text", "image": "image", "text-model": "text", "image-model": "image"}
"""What `--model-type` takes, the seed's names among them."""

ROUTES = ("auto", "star", "chain")
"""Workers answer the master, or hand over to one another; auto: hand over where they can reach one another."""

SD_VERSIONS = ("v1-5", "v2-1", "xl", "turbo")

MODEL, LOADING, CLUSTER, GUESSING, IMAGES = "Model", "Loading", "Cluster", "Speculation", "Image models"

GROUPS: Mapping[str, tuple[Callable[[F], F], ...]] = {
    "model": (
        option(MODEL, "--model", metavar="M", help="Folder, .gguf or .safetensors file, or hub id org/name[:Q4_K_M]."),
        option(MODEL, "--model-type", type=click.Choice(list(MODEL_TYPES)), metavar="text|image", help="Which kind of model."),
    ),
    "topology": (
        option(MODEL, "--topology", type=click.Path(path_type=Path), metavar="T", help="YAML file: node to host and layers."),
    ),
    "load": (
        option(LOADING, "--dtype", default="auto", metavar="D", help="auto, f32, f16 or bf16.", show_default=True),
        option(
            LOADING, "--device", default="auto", metavar="D", show_default=True,
            help="auto, cpu, cuda, cuda:1, mps, xpu, or several, the fastest first: cuda:0,cuda:1,cpu.",
        ),
        option(LOADING, "--threads", type=int, metavar="N", help="Compute threads on a CPU."),
        option(LOADING, "--context", type=int, metavar="N", help="Most tokens of prompt and answer together."),
        option(LOADING, "--kv-tokens", type=int, metavar="N", help="Tokens of KV cache for all sessions together."),
        option(LOADING, "--quantize", metavar="Q", help="Quantise weights at load: none, int8 or int4."),
        option(LOADING, "--kv-dtype", default="auto", metavar="D", help="KV cache: auto, f32, f16, bf16 or int8."),
    ),
    "key": (
        option(CLUSTER, "--cluster-key", "--key", "cluster_key", metavar="KEY", help="Key or passphrase; see `cake key`."),
        option(CLUSTER, "--insecure", is_flag=True, help="No key and no encryption: anyone who reaches a port may use it."),
    ),
    "cluster": (
        option(CLUSTER, "--listen", metavar="H:P", help="Where workers that --join dial the master."),
        option(
            CLUSTER, "--workers", default="auto", show_default=True, envvar="CAKE_WORKERS", metavar="auto|none|H:P,...",
            help="Where to look for workers without layers of their own: on the local network, nowhere, or there.",
        ),
        option(
            CLUSTER, "--plan-for", type=click.Choice(["latency", "throughput"]), default="latency", show_default=True,
            help="What the planner aims at: the least time a token, or the most tokens a second.",
        ),
        option(CLUSTER, "--spread", is_flag=True, help="Share the model among all workers, also where fewer would do."),
        option(CLUSTER, "--wait", type=float, default=10, metavar="S", show_default=True, help="Seconds to wait for workers."),
        option(CLUSTER, "--rejoin-timeout", type=float, default=30, metavar="S", help="Wait for a lost worker."),
        option(
            CLUSTER, "--silence-timeout", type=click.FloatRange(min=4), default=10, show_default=True, metavar="S",
            help="Take a worker that says nothing for so long for lost.",
        ),
        option(
            CLUSTER, "--on-loss", type=click.Choice(["wait", "replan"]), default="wait", show_default=True,
            help="Wait for a lost worker, or place its layers on others that have memory to spare.",
        ),
        option(CLUSTER, "--wire-dtype", default="auto", metavar="D", help="Dtype of activations on the network, also f8e4m3."),
        option(CLUSTER, "--route", type=click.Choice(ROUTES), default="auto", help="How batches go between workers."),
    ),
    "guessing": (
        option(
            GUESSING, "--speculate", default="auto", metavar="auto|off|lookup|N", show_default=True,
            help="Guess tokens from the text: where it pays, never, also on GPUs, or at most N a step.",
        ),
        option(GUESSING, "--draft", metavar="M", help="A small model of the same family to guess with, on this machine."),
    ),
    "image": (
        option(IMAGES, "--sd-version", type=click.Choice(SD_VERSIONS), help="Which Stable Diffusion to take from the hub."),
        option(IMAGES, "--sd-tokenizer", metavar="FILE", help="tokenizer.json to use instead of the model's."),
        option(IMAGES, "--sd-tokenizer-2", metavar="FILE", help="The same for the second text encoder."),
        option(IMAGES, "--sd-clip", metavar="FILE", help="Weights of the text encoder."),
        option(IMAGES, "--sd-clip2", metavar="FILE", help="Weights of the second text encoder."),
        option(IMAGES, "--sd-clip3", metavar="FILE", help="Weights of the third text encoder."),
        option(IMAGES, "--sd-unet", metavar="FILE", help="Weights of the unet."),
        option(IMAGES, "--sd-transformer", metavar="FILE", help="Weights of the transformer, in models without a unet."),
        option(IMAGES, "--sd-vae", metavar="FILE", help="Weights of the autoencoder."),
        option(IMAGES, "--sd-config", metavar="M", help="Model whose configuration a single file lacks."),
        option(IMAGES, "--sd-lora", multiple=True, metavar="FILE[=SCALE]", help="LoRA to apply; may be repeated."),
        option(IMAGES, "--sd-use-f16/--no-sd-use-f16", default=None, help="Take the fp16 files where a model has them."),
        option(IMAGES, "--sd-use-flash-attention", is_flag=True, help="As the seed had it; attention is fused anyway."),
        option(IMAGES, "--sd-sliced-attention-size", type=int, metavar="N", help="Attention slices, 0 for automatic."),
        option(IMAGES, "--sd-scheduler", metavar="NAME", help="Another scheduler than the model's: ddim, euler, ..."),
        option(IMAGES, "--sd-clip-skip", type=int, metavar="N", help="Leave out the text encoder's last N layers."),
        option(IMAGES, "--sd-long-prompts", is_flag=True, help="Encode prompts over 77 tokens in chunks."),
        option(IMAGES, "--sd-loop", type=click.Choice(["master", "worker"]), help="Where the denoising loop runs."),
        option(IMAGES, "--sd-compile", is_flag=True, help="Compile the unet: slower start, faster steps."),
        option(IMAGES, "--sd-parallel", type=click.Choice(["images", "guidance"]), help="What replicas of the unet share."),
    ),
    "image-size": (
        option(IMAGES, "--sd-width", type=int, metavar="N", help="Width of images that ask for none."),
        option(IMAGES, "--sd-height", type=int, metavar="N", help="Height of images that ask for none."),
    ),
}  # fmt: skip
