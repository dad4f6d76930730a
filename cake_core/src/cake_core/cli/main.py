"""The `cake` group: core's commands by table, imported when asked for, and those of plugins."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from cake_core import __version__
from cake_core.cli.app import app_of, reported, run_command
from cake_core.errors import PluginError

if TYPE_CHECKING:
    from cake_core.plugins import Plugins

COMMANDS = {
    "cache": "cake_core.cli.cache:cache",
    "chat": "cake_core.cli.chat:chat",
    "doctor": "cake_core.cli.doctor:doctor",
    "key": "cake_core.cli.key:key",
    "list": "cake_core.cli.models:list_models",
    "nodes": "cake_core.cli.nodes:nodes",
    "plugins": "cake_core.cli.plugins:plugins",
    "pull": "cake_core.cli.models:pull",
    "rm": "cake_core.cli.models:rm",
    "run": "cake_core.cli.run:run",
    "split-model": "cake_core.cli.split:split_model",
    "topology": "cake_core.cli.topology:topology",
    "worker": "cake_core.cli.worker:worker",
}
"""Core's own commands: name to `module:attribute`."""

ELSEWHERE = {"serve": "cake-server", "status": "cake-server"}
"""Commands that users look for and another distribution of ours brings."""


class CakeGroup(click.Group):
    """Finds a command in core's table or among the plugins, and reports errors of any of them."""

    given_plugins: Plugins | None = None
    """Plugins to use instead of the installed ones (tests)."""
    _plugin_commands_added = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        self._add_plugin_commands(ctx)
        return sorted({*COMMANDS, *super().list_commands(ctx)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            module, _, attribute = COMMANDS[cmd_name].partition(":")
            command: click.Command = getattr(import_module(module), attribute)
            return command
        self._add_plugin_commands(ctx)
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:  # fmt: skip
        with reported():
            if args[0] in ELSEWHERE and self.get_command(ctx, args[0]) is None:
                raise PluginError(
                    f"`cake {args[0]}` comes with {ELSEWHERE[args[0]]}, which is not installed or failed to load: "
                    f"`pip install {ELSEWHERE[args[0]]}`, and see `cake plugins`"
                )
        if not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            close = difflib.get_close_matches(args[0], self.list_commands(ctx), 1)
            hint = f"did you mean {close[0]!r}?" if close else "`cake --help` lists them."
            ctx.fail(f"No such command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with reported():
            return super().invoke(ctx)

    def _add_plugin_commands(self, ctx: click.Context) -> None:
        if not self._plugin_commands_added:
            self._plugin_commands_added = True
            app_of(ctx).plugins.add_commands(self)


def make_cli(plugins: Plugins | None = None) -> CakeGroup:
    """A fresh `cake` group, over the installed plugins or over these."""

    @click.group(cls=CakeGroup, name="cake", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
    @click.option("-v", "--verbose", count=True, help="Log what happens; twice for everything.")
    @click.version_option(__version__, prog_name="cake")
    @click.pass_context
    def cake(ctx: click.Context, verbose: int) -> None:  # noqa: ARG001 - app_of reads it from the context
        """Several machines, one model: text and images over a cluster of your own devices."""
        app_of(ctx)

    cake.given_plugins = plugins
    return cake


def main() -> None:
    """Entry point of `cake`."""
    run_command(make_cli(), "cake")
