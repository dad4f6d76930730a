"""Hooks of cake-sd: image models over diffusers, `cake bench image`."""

from collections.abc import Iterable

from click import Group

from cake_core import hookimpl
from cake_core.checkpoint import Checkpoint
from cake_core.model import Backend


@hookimpl
def cake_register_backends() -> Iterable[Backend]:
    from cake_sd.backend import SdBackend

    return (SdBackend(),)


@hookimpl
def cake_register_commands(cli: Group) -> None:
    from cake_sd.commands import add_commands

    add_commands(cli)


@hookimpl
def cake_resolve_checkpoint(reference: str) -> Checkpoint | None:
    from cake_sd.hub import resolve

    return resolve(reference)
