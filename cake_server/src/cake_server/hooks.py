"""What cake-server adds to Cake: `cake serve` and `cake bench serve`."""

from __future__ import annotations

import click

from cake_core import hookimpl


@hookimpl
def cake_register_commands(cli: click.Group) -> None:
    from cake_server.commands import add_commands

    add_commands(cli)
