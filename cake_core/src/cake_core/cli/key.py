"""`cake key`: shows this machine's cluster key, makes one, takes one over from another machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cake_core.cli.app import current_app
from cake_core.cli.console import note
from cake_core.errors import ConfigError

if TYPE_CHECKING:
    from cake_core.security.keys import ClusterKey


@click.group()
def key() -> None:
    """Show, make or take over the cluster key, which every machine of a cluster must hold."""


@key.command()
@click.option("--qr", is_flag=True, help="Also as a QR code, for a phone or a tablet.")
def show(qr: bool) -> None:
    """Print this machine's key and the line to run on the others."""
    from cake_core.security.keys import FILE_VARIABLE, VARIABLE, find_key

    found = find_key(None, current_app().options.config_dir)
    if found is None:
        raise ConfigError(
            "this machine has no cluster key yet; `cake key new` makes one, `cake key join KEY` takes one over "
            f"({VARIABLE} or {FILE_VARIABLE} name one for a single process)"
        )
    _tell(found, qr)


@key.command()
@click.option("--replace", is_flag=True, help="Also when there is one: machines that hold the old key are then locked out.")
@click.option("--qr", is_flag=True, help="Also as a QR code.")
def new(replace: bool, qr: bool) -> None:
    """Make a random key and keep it on this machine."""
    import secrets

    from cake_core.security.keys import ClusterKey

    path = _path()
    made = ClusterKey(secrets.token_bytes(32), str(path), made=True)
    _keep(made, path, replace)
    _tell(made, qr)


@key.command()
@click.argument("text", metavar="[KEY]", required=False)
@click.option("--replace", is_flag=True, help="Also when this machine has another key already.")
def join(text: str | None, replace: bool) -> None:
    """Take over the key that `cake key show` printed on another machine.

    Without KEY it is asked for, so that it stays out of the shell's history. 64 hex digits are a key, any other text is a
    passphrase.
    """
    from cake_core.security.keys import parse_key, read_key

    given = parse_key(text if text is not None else click.prompt("Cluster key", hide_input=True, err=True), "given")
    path = _path()
    have = read_key(path)
    if have is not None and have.secret == given.secret:
        note(f"this machine holds that key already ({path})")
        return
    _keep(given, path, replace)
    note(f"kept in {path}; start the worker or the master again")


def _path() -> Path:
    from cake_core.security.keys import FILE, key_folder

    return key_folder(current_app().options.config_dir) / FILE


def _keep(given: ClusterKey, path: Path, replace: bool) -> None:
    from cake_core.security.keys import keep_key

    if not keep_key(given, path, replace):
        raise ConfigError(f"this machine has a cluster key already ({path}); add --replace to give it up")


def _tell(found: ClusterKey, qr: bool) -> None:
    note(f"from {found.source}; on every other machine of the cluster run once:")
    click.echo(f"cake key join {found.text}")
    if qr:
        try:
            import segno
        except ImportError as error:
            raise ConfigError("a QR code needs segno: `pip install cake-core[qr]`") from error
        segno.make(found.text, micro=False).terminal(compact=True)
