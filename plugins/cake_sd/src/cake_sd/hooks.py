"""Hooks of cake-sd: image models over diffusers, models by name, `cake bench image`."""

from typing import Any

from cake_core import hookimpl


@hookimpl
def cake_register_backends() -> Any:
    from cake_sd.backend import SdBackend

    return (SdBackend(),)


@hookimpl
def cake_register_commands(cli: Any) -> None:
    from cake_sd.commands import add_commands

    add_commands(cli)


@hookimpl
def cake_resolve_checkpoint(reference: str) -> Any:
    from cake_sd.hub import resolve

    return resolve(reference)
