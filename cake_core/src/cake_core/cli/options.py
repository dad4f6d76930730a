"""The options that every command which loads a model takes, declared once, and what they build.

A command asks for groups of them: `@model_options()` for all, `@model_options("model", "load")` for some, and gets them as
one `ModelFlags`, passed as `flags`. cake_server's `serve` uses the same decorator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from cake_core.cli.console import note
from cake_core.cli.sections import F, option
from cake_core.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from cake_core.checkpoint import Checkpoint
    from cake_core.connect import Connector, Keyring
    from cake_core.keys import ClusterKey
    from cake_core.model import LoadOptions
    from cake_core.plugins import Plugins
    from cake_core.runtime import RunSpec
    from cake_core.topology import Topology

MODEL_TYPES = {"text": "text", "image": "image", "text-model": "text", "image-model": "image"}
"""What `--model-type` takes, the seed's names among them."""

DEFAULT_IMAGE_MODEL = "emoji"
"""The reference that stands for "the default model" where an image model is wanted; for text it is the empty one."""

SD_VERSIONS = ("v1-5", "v2-1", "xl", "turbo")

MODEL, LOADING, CLUSTER, IMAGES = "Model", "Loading", "Cluster", "Image models"

_GROUPS: Mapping[str, tuple[Callable[[F], F], ...]] = {
    "model": (
        option(MODEL, "--model", metavar="M", help="Folder, .gguf or .safetensors file, or hub id org/name[:Q4_K_M]."),
        option(MODEL, "--model-type", type=click.Choice(list(MODEL_TYPES)), metavar="text|image", help="Which kind of model."),
    ),
    "topology": (
        option(MODEL, "--topology", type=click.Path(path_type=Path), metavar="T", help="YAML file: node to host and layers."),
    ),
    "load": (
        option(LOADING, "--dtype", default="auto", metavar="D", help="auto, f32, f16 or bf16.", show_default=True),
        option(LOADING, "--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1, mps, xpu.", show_default=True),
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
        option(CLUSTER, "--wait", type=float, default=10, metavar="S", show_default=True, help="Seconds to wait for workers."),
        option(CLUSTER, "--rejoin-timeout", type=float, default=30, metavar="S", help="Wait for a lost worker."),
        option(CLUSTER, "--wire-dtype", default="auto", metavar="D", help="Dtype of activations on the network."),
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
ALL = tuple(_GROUPS)


_VALUES = {
    "quantize": ("none", "int8", "int4"),
    "kv_dtype": ("auto", "f32", "f16", "bf16", "int8"),
    "wire_dtype": ("auto", "f32", "f16", "bf16"),
}


@dataclass(frozen=True, slots=True)
class ModelFlags:
    """The values of the shared options. Fields are named for their option; `sd` holds those of image models that were given,
    by option name (`version`, `use_f16`, ...)."""

    model: str | None = None
    model_type: str | None = None
    topology: Path | None = None
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    context: int | None = None
    kv_tokens: int | None = None
    quantize: str | None = None
    kv_dtype: str = "auto"
    cluster_key: str | None = None
    insecure: bool = False
    listen: str | None = None
    wait: float = 10.0
    rejoin_timeout: float = 30.0
    wire_dtype: str = "auto"
    sd: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Literal["text", "image"] | None:
        """The model type asked for. Raises ConfigError for one there is not."""
        if self.model_type is None:
            return None
        known = MODEL_TYPES.get(self.model_type)
        if known is None:
            raise ConfigError(f"unknown model type {self.model_type!r}; use text or image")
        return cast("Literal['text', 'image']", known)

    def load_topology(self) -> Topology:
        """The topology file, or an empty topology: everything on this machine."""
        from cake_core.topology import Topology, load_topology

        return Topology() if self.topology is None else load_topology(self.topology)

    def load_options(self) -> LoadOptions:
        """Raises ConfigError, naming the option, for a value there is not."""
        from cake_core.model import LoadOptions

        for name, known in _VALUES.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                option_name = name.replace("_", "-")
                raise ConfigError(f"--{option_name} is one of {', '.join(known)}, not {value!r}")
        return LoadOptions(
            dtype=self.dtype,
            device=self.device,
            threads=self.threads,
            context=self.context,
            kv_tokens=self.kv_tokens,
            quantize=None if self.quantize == "none" else self.quantize,
            kv_dtype=self.kv_dtype,
            extra={f"sd_{name}": value for name, value in self.sd.items()},
        )

    def reference(self) -> str:
        """What to resolve: `--model`, else the name of the default."""
        if self.model is not None:
            return self.model
        if self.kind == "image":
            return self.sd.get("version") or DEFAULT_IMAGE_MODEL
        return ""

    def checkpoint(self, plugins: Plugins) -> Checkpoint:
        """The model, found or downloaded. Raises CheckpointError with the remedy."""
        from cake_core.cli.models import download_missing

        reference = self.reference()
        download_missing(reference)
        try:
            return plugins.resolve(reference)
        except CheckpointError as error:
            if reference == DEFAULT_IMAGE_MODEL and self.model is None:
                raise CheckpointError(
                    "the default image model is not installed: `pip install cake-emoji`, or name one with --model"
                ) from error
            raise

    def run_spec(
        self, plugins: Plugins, checkpoint: Checkpoint, progress: Callable[[str, int, int], None] | None = None
    ) -> RunSpec:
        """Everything `open_text` and `open_image` want."""
        from cake_core.runtime import RunSpec

        topology = self.load_topology()
        connector = self.connector(plugins, topology)
        return RunSpec(
            checkpoint=checkpoint,
            topology=topology,
            options=self.load_options(),
            dial=connector.dial,
            joined=connector.joined,
            wait=self.wait,
            rejoin=self.rejoin_timeout,
            wire_dtype="" if self.wire_dtype == "auto" else self.wire_dtype,
            progress=progress,
        )

    def keyring(self) -> Keyring:
        """The cluster key these options name; a key that is new is shown, because the other machines need it."""
        from cake_core.config import load_options
        from cake_core.connect import Keyring

        return Keyring(self.cluster_key, load_options().config_dir, self.insecure, _show_new_key)

    def connector(self, plugins: Plugins, topology: Topology) -> Connector:
        """The way to the topology's workers. Raises ConfigError for a node that can never be reached."""
        from cake_core.connect import Connector
        from cake_core.transport import Address

        for node in topology.nodes:
            if node.host is not None:
                plugins.transport(node.host.scheme)
        joining = [node.name for node in topology.nodes if node.host is None and node.layers]
        listen_at = None if self.listen is None else Address.parse(self.listen)
        return Connector(plugins, self.keyring(), joining, listen_at)


def _show_new_key(key: ClusterKey) -> None:
    note(f"made a new cluster key in {key.source}; on the other machines of this cluster run once:")
    note(f"    cake key join {key.text}")


def model_options(*groups: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds the options of these groups (default: all) to a command, which gets them as the one argument `flags`."""
    chosen = [add for group in groups or ALL for add in _GROUPS[group]]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            plain = {name: kwargs.pop(name) for name in _PLAIN & kwargs.keys()}
            sd = {name.removeprefix("sd_"): kwargs.pop(name) for name in [n for n in kwargs if n.startswith("sd_")]}
            # A switch left alone is False, but `--no-sd-use-f16` is False on purpose: there None means left alone.
            given = {
                name: value
                for name, value in sd.items()
                if value not in (None, False, ()) or (name == "use_f16" and value is False)
            }
            return function(*args, flags=ModelFlags(**plain, sd=given), **kwargs)

        result: Callable[..., Any] = wrapper
        for add in reversed(chosen):
            result = add(result)
        return result

    return decorate


_PLAIN = {f.name for f in fields(ModelFlags)} - {"sd"}
