"""`cake-cli` and `cake-split-model`: the command lines of the original, translated into `cake`'s.

The flags, defaults and role of each command are the original's; what was broken in it is not repeated.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from cake_core.cli.app import CliError, run_command
from cake_core.cli.option_groups import MODEL_TYPES
from cake_core.errors import ConfigError

SEED = 299792458
DATA = "./cake-data"
TEXT_PROMPT = "The sky is blue because "
IMAGE_PROMPT = "A very realistic photo of a rusty robot walking on a sandy beach"
SYSTEM_PROMPT = "You are a helpful AI assistant."

_SD_VALUES = (
    "sd-version", "sd-tokenizer", "sd-tokenizer-2", "sd-width", "sd-height", "sd-sliced-attention-size",
    "sd-clip", "sd-clip2", "sd-vae", "sd-unet",
)  # fmt: skip
_SD_JOB = (
    "sd-uncond-prompt", "sd-n-steps", "sd-num-samples", "sd-bsize", "sd-intermediary-images", "sd-guidance-scale",
    "sd-img2img", "sd-img2img-strength", "sd-seed",
)  # fmt: skip


def _sd_options(function: Any) -> Any:
    for name in reversed((*_SD_VALUES, *_SD_JOB, "sd-image-prompt")):
        function = click.option(f"--{name}", metavar="X")(function)
    function = click.option("--sd-use-f16/--no-sd-use-f16", default=None)(function)
    function = click.option("--sd-use-flash-attention", is_flag=True)(function)
    return click.option("--sd-tracing", is_flag=True)(function)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--mode", type=click.Choice(["master", "worker"]), default="master", show_default=True)
@click.option("--name", metavar="N", help="Worker name in the topology.")
@click.option("--address", default="127.0.0.1:10128", show_default=True, metavar="H:P", help="Worker's address.")
@click.option("--api", metavar="H:P", help="Serve the REST API here; without it the master generates once.")
@click.option(
    "--model",
    default=f"{DATA}/Meta-Llama-3-8B/",
    show_default=True,
    metavar="M",
    help="Model folder or cache.",
)
@click.option("--model-type", type=click.Choice(list(MODEL_TYPES)), default="text-model", show_default=True)
@click.option("--topology", metavar="T", help="Topology file.")
@click.option("--prompt", default=TEXT_PROMPT, show_default=True)
@click.option("--system-prompt", default=SYSTEM_PROMPT, show_default=True)
@click.option("--seed", type=int, default=SEED, show_default=True)
@click.option("--sample-len", "-n", type=int, default=100, show_default=True, metavar="N", help="Most tokens to generate.")
@click.option("--temperature", type=float, default=1.0, show_default=True)
@click.option("--top-p", type=float)
@click.option("--top-k", type=int)
@click.option("--repeat-penalty", type=float, default=1.1, show_default=True)
@click.option("--repeat-last-n", type=int, default=128, show_default=True)
@click.option("--dtype", metavar="D", help="f16, bf16 or f32.  [default: f16; for images what the device computes well]")
@click.option("--cpu", is_flag=True, help="Use the CPU even where there is a GPU.")
@click.option("--device", type=int, default=0, show_default=True, help="Which GPU.")
@click.option("--cluster-key", metavar="KEY", help="Cluster key or passphrase; see `cake key`.")
@click.option("--insecure", is_flag=True, help="No key and no encryption.")
@_sd_options
def cake_cli_command(**given: Any) -> None:
    """The original's command: a worker, a master with a REST API, or one generation."""
    arguments, environment = translate(given)
    os.environ.update(environment)
    _run(arguments)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model-path", default=f"{DATA}/Meta-Llama-3-8B/", show_default=True)
@click.option("--topology", default=f"{DATA}/topology.yml", show_default=True)
@click.option("--worker", help="Only this worker's bundle.")
@click.option("--output", required=True, help="Folder for the bundles.")
def cake_split_model_command(model_path: str, topology: str, worker: str | None, output: str) -> None:
    """The original's splitter: one folder a worker with only its layers."""
    only = ["--worker", worker] if worker else []
    _run(["split-model", "--model-path", model_path, "--topology", topology, *only, "--output", output])


def _run(arguments: list[str]) -> None:
    from cake_core.cli.main import make_cli

    make_cli().main(arguments, prog_name="cake", standalone_mode=False)


def translate(given: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """The `cake` command that does what these `cake-cli` options say, and the environment it wants.

    Raises ConfigError (through click) for combinations that the original refused.
    """
    kind = MODEL_TYPES[given["model_type"]]
    model, environment = _model(given, kind)
    shared = ["--model-type", kind, *model, *_loading(given, kind), *_image_loading(given, kind)]
    if given["mode"] == "worker":
        if not given["name"]:
            raise CliError(ConfigError("no --name provided for worker; give the name it has in the topology"))
        return ["worker", *shared, "--name", given["name"], "--address", given["address"]], environment
    if given["api"]:
        more = _sampling(given) if kind == "text" else _pairs(given, ("sd-width", "sd-height"))
        return ["serve", *shared, "--api", given["api"], *more], environment
    if kind == "image":
        Path("images").mkdir(exist_ok=True)
        prompt = given["sd_image_prompt"] or (given["prompt"] if given["prompt"] != TEXT_PROMPT else IMAGE_PROMPT)
        return ["run", *shared, *_image_job(given), "--output", "images/image_0.png", "--", prompt], environment
    system = ["--system-prompt", given["system_prompt"]]
    return ["run", *shared, *_sampling(given), *system, "--", given["prompt"]], environment


def _model(given: Mapping[str, Any], kind: str) -> tuple[list[str], dict[str, str]]:
    """`--model` as the original meant it: for images it is a Hugging Face cache, unless it is a model itself."""
    model = Path(given["model"])
    itself = model.is_file() or any((model / name).is_file() for name in ("model_index.json", "config.json"))
    if kind == "image" and not itself:
        # The name of a version is a reference as any other: cake-sd knows its hub ids and mirrors.
        return ["--model", given["sd_version"] or "v1-5"], {"HF_HUB_CACHE": str(model / "hub")}
    return ["--model", given["model"]], {}


def _loading(given: Mapping[str, Any], kind: str) -> list[str]:
    device = "cpu" if given["cpu"] else "auto" if given["device"] == 0 else f"cuda:{given['device']}"
    # The original's f16 is what its text models are stored as; convolutions in f16 on a CPU would take minutes.
    dtype = given["dtype"] or ("f16" if kind == "text" else "auto")
    arguments = ["--dtype", dtype, "--device", device]
    arguments += _pairs(given, ("topology", "cluster-key"))
    return [*arguments, *(["--insecure"] if given["insecure"] else [])]


def _image_loading(given: Mapping[str, Any], kind: str) -> list[str]:
    if kind != "image":
        return []
    names = [name for name in _SD_VALUES if name not in ("sd-width", "sd-height")]
    f16 = {None: [], True: ["--sd-use-f16"], False: ["--no-sd-use-f16"]}[given["sd_use_f16"]]
    flash = ["--sd-use-flash-attention"] if given["sd_use_flash_attention"] else []
    return [*_pairs(given, names), *f16, *flash]


def _image_job(given: Mapping[str, Any]) -> list[str]:
    tracing = ["--sd-tracing"] if given["sd_tracing"] else []
    return [*_pairs(given, ("sd-width", "sd-height", *_SD_JOB)), *tracing]


def _sampling(given: Mapping[str, Any]) -> list[str]:
    names = ("temperature", "top-p", "top-k", "repeat-penalty", "repeat-last-n", "seed")
    return ["--max-tokens", str(given["sample_len"]), *_pairs(given, names)]


def _pairs(given: Mapping[str, Any], names: Any) -> list[str]:
    """`--name value` for each name that was given."""
    found = [(name, given[name.replace("-", "_")]) for name in names]
    return [text for name, value in found if value is not None for text in (f"--{name}", str(value))]


def cake_cli() -> None:
    """Entry point of `cake-cli`."""
    run_command(cake_cli_command, "cake-cli")


def cake_split_model() -> None:
    """Entry point of `cake-split-model`."""
    run_command(cake_split_model_command, "cake-split-model")
