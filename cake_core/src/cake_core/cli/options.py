"""What the options that every command which loads a model takes build: a model, load options, a run.

A command asks for groups of them: `@model_options()` for all, `@model_options("model", "load")` for some, and gets them as
one `ModelFlags`, passed as `flags`. cake_server's `serve` uses the same decorator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from cake_core.cli.console import note
from cake_core.cli.option_groups import GROUPS, MODEL_TYPES
from cake_core.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from cake_core.checkpoint import Checkpoint
    from cake_core.cluster.chain import Way
    from cake_core.engine.speculation import Speculation
    from cake_core.links.connect import Connector, Keyring
    from cake_core.model import LoadOptions
    from cake_core.plugins import Plugins
    from cake_core.runtime import RunSpec
    from cake_core.security.keys import ClusterKey
    from cake_core.topology import Topology

DEFAULT_IMAGE_MODEL = "emoji"
"""The reference that stands for "the default model" where an image model is wanted; for text it is the empty one."""

_VALUES = {
    "quantize": ("none", "int8", "int4"),
    "kv_dtype": ("auto", "f32", "f16", "bf16", "int8"),
    "wire_dtype": ("auto", "f32", "f16", "bf16", "f8e4m3"),
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
    workers: str = "none"
    spread: bool = False
    plan_for: Literal["latency", "throughput"] = "latency"
    wait: float = 10.0
    rejoin_timeout: float = 30.0
    silence_timeout: float = 10.0
    on_loss: Literal["wait", "replan"] = "wait"
    wire_dtype: str = "auto"
    speculate: str = "auto"
    draft: str | None = None
    route: str = "auto"
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
        self,
        plugins: Plugins,
        checkpoint: Checkpoint,
        progress: Callable[[str, int, int], None] | None = None,
        connector: Connector | None = None,
    ) -> RunSpec:
        """Everything `open_text` and `open_image` want; workers without layers are looked for and given some."""
        from cake_core.cli.gather import gathered_topology
        from cake_core.cli.machine import prober
        from cake_core.links.link import LinkTiming
        from cake_core.runtime import RunSpec
        from cake_core.topology import MASTER

        topology, options = self.load_topology(), self.load_options()
        connector = connector or self.connector(plugins, topology)
        gathered = gathered_topology(plugins, self, checkpoint, connector, topology)
        return RunSpec(
            checkpoint=checkpoint,
            topology=gathered.topology,
            options=replace(options, kv_tokens=options.kv_tokens or gathered.kv_tokens),
            dial=connector.dial,
            joined=connector.joined,
            joined_again=connector.joined_again,
            wait=self.wait,
            rejoin=self.rejoin_timeout,
            wire_dtype="" if self.wire_dtype == "auto" else self.wire_dtype,
            speculation=self.speculation(),
            draft=None if self.draft is None else plugins.resolve(self.draft),
            route=cast("Way", self.route),
            on_loss=self.on_loss,
            spares=gathered.spares,
            profile=functools.partial(prober(plugins, options).node, MASTER),
            timing=LinkTiming(dead=self.silence_timeout),
            progress=progress,
        )

    def speculation(self) -> Speculation | None:
        """Raises ConfigError for what --speculate does not take."""
        from cake_core.engine.speculation import MOST, Speculation

        if self.speculate == "off":
            if self.draft is not None:
                raise ConfigError("--draft guesses, which --speculate off forbids; leave one of them out")
            return None
        if self.speculate in ("auto", "lookup"):
            return Speculation(MOST, everywhere=self.speculate == "lookup" or self.draft is not None)
        if not self.speculate.isascii() or not self.speculate.isdigit() or not 1 <= int(self.speculate) <= 128:
            raise ConfigError(f"--speculate is auto, off, lookup or a number from 1 to 128, not {self.speculate!r}")
        return Speculation(int(self.speculate), everywhere=True)

    def keyring(self) -> Keyring:
        """The cluster key these options name; a key that is new is shown, because the other machines need it."""
        from cake_core.config import load_options
        from cake_core.links.connect import Keyring

        return Keyring(self.cluster_key, load_options().config_dir, self.insecure, _show_new_key)

    def connector(self, plugins: Plugins, topology: Topology) -> Connector:
        """The way to the topology's workers. Raises ConfigError for a node that can never be reached."""
        from cake_core.links.connect import Connector
        from cake_core.transport import Address

        for node in topology.nodes:
            if node.host is not None:
                plugins.transport(node.host.scheme)
        listen_at = None if self.listen is None else Address.parse(self.listen)
        joining = [node.name for node in topology.nodes if node.host is None]
        anybody = listen_at is not None and not topology.nodes
        return Connector(plugins, self.keyring(), None if anybody else joining, listen_at)


def _show_new_key(key: ClusterKey) -> None:
    note(f"made a new cluster key in {key.source}; on the other machines of this cluster run once:")
    note(f"    cake key join {key.text}")


def model_options(*groups: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds the options of these groups (default: all) to a command, which gets them as the one argument `flags`."""
    chosen = [add for group in groups or tuple(GROUPS) for add in GROUPS[group]]

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
