"""Writes docs/cli.md from the commands' own help: `python tools/docs_cli.py`. A test says when it is due."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from cake_core.cli.main import COMMANDS, make_cli
from cake_core.cli.seed import cake_cli_command, cake_split_model_command
from cake_core.plugins import Plugins

TARGET = Path(__file__).parents[1] / "docs" / "cli.md"
WIDTH = 100
HEAD = """\
# The command line

What `--help` prints; written by `tools/docs_cli.py`. `cake serve` and `cake bench` come with cake-server and describe
themselves. Every command takes `-v` before its name to log what happens, and `-vv` for everything.

Exit codes: 0 for success, 1 for what went wrong at run time (a worker that is gone, no memory), 2 for what was asked wrongly
(an option, a file, a topology), 130 after Ctrl-C. Errors are one line on stderr that says what to do. `cake run` writes
nothing but the answer to stdout.

Environment: `CAKE_CONFIG_DIR` and `CAKE_CACHE_DIR` (folders), `CAKE_CLUSTER_KEY` and `CAKE_CLUSTER_KEY_FILE` (the key),
`CAKE_PLUGINS` (only these plugins) and `CAKE_PLUGINS_OFF` (not these), `CAKE_TRACE_HOOKS=1` (log hook calls), and the hub's
own `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_HUB_OFFLINE`.
"""


def helps() -> Iterator[tuple[str, str]]:
    """(command line, help) of core's commands and their subcommands, then of the original's two."""
    cli = make_cli(Plugins(entries=()))
    root = click.Context(cli, info_name="cake", help_option_names=["-h", "--help"])
    for name in sorted(COMMANDS):
        command = cli.get_command(root, name)
        if command is not None:
            yield from _help(command, click.Context(command, info_name=name, parent=root))
    for command, name in ((cake_cli_command, "cake-cli"), (cake_split_model_command, "cake-split-model")):
        yield from _help(command, click.Context(command, info_name=name, help_option_names=["-h", "--help"]))


def _help(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    context.terminal_width = WIDTH
    if isinstance(command, click.Group):
        for name, child in sorted(command.commands.items()):
            yield from _help(child, click.Context(child, info_name=name, parent=context))
    else:
        yield context.command_path, command.get_help(context)


def render() -> str:
    return HEAD + "".join(f"\n## `{name}`\n\n```text\n{text}\n```\n" for name, text in helps())


if __name__ == "__main__":
    os.environ.setdefault("CAKE_PLUGINS", "")
    sys.stdout.write(f"{TARGET}: {TARGET.write_text(render(), 'utf-8')} characters\n")
