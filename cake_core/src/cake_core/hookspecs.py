"""Every hook of Cake. A plugin implements some of them with `cake_core.hookimpl` and names itself in the entry-point
group `cake`. Hooks hand over declarations; the objects they hand over do the work; no hook is on the token path.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import click

    from cake_core.checkpoint import Checkpoint
    from cake_core.config import Options
    from cake_core.events import ClusterEvent
    from cake_core.model import Backend, ModelInfo
    from cake_core.placement import Placement
    from cake_core.topology import Topology
    from cake_core.transport import Transport

hookspec = pluggy.HookspecMarker("cake")
hookimpl = pluggy.HookimplMarker("cake")


@hookspec
def cake_register_backends() -> Iterable[Backend]:  # type: ignore[empty-body]
    """Model backends of this plugin.

    Called once, when a model is first looked for. Return instances that are cheap to make: nothing heavy may be imported
    before `Backend.load`. Names must be unique over all plugins; a second one of the same name is skipped and reported.
    """


@hookspec
def cake_register_transports() -> Iterable[Transport]:  # type: ignore[empty-body]
    """Transports of this plugin, one instance a scheme.

    Called once, when an address is first used. Schemes must be unique over all plugins.
    """


@hookspec
def cake_register_commands(cli: click.Group) -> None:
    """Adds commands to `cake`. Called at start-up of the command line, so import a command's needs inside it.

    :param cli: the `cake` group; use `cli.add_command`.
    """


@hookspec(historic=True)
def cake_configure(options: Options) -> None:
    """Told once how this process is configured; a plugin that is loaded later is told then.

    :param options: configuration folder, cache folder, verbosity.
    """


@hookspec(firstresult=True)
def cake_resolve_checkpoint(reference: str) -> Checkpoint | None:
    """Turns what a user wrote after `--model` into a checkpoint on this machine. The first answer wins.

    Built in and tried last: a folder, a `.gguf` or `.safetensors` file, a hub id (`org/name`, `org/name:Q4_K_M`,
    `org/name/file.gguf`) from the local cache or downloaded.

    :param reference: as written; may be empty for "the default model".
    :return: None to let others try. Raise CheckpointError only for a reference that is certainly meant for this plugin.
    """


@hookspec(firstresult=True)
def cake_plan_placement(model: ModelInfo, topology: Topology) -> Placement | None:
    """Decides which node serves which layers. The first answer wins; core checks any answer.

    Built in and tried last: what the topology says, everything else on the master.

    :return: None to let others try.
    """


@hookspec
def cake_on_event(event: ClusterEvent) -> None:
    """Observes nodes and requests. Called from Cake's own threads: return at once. Errors are logged, never raised."""
