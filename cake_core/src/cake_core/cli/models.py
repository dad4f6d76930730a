"""`cake pull`, `cake list`, `cake rm`: models on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from cake_core.cli.console import Bars, human_bytes, note, show_json, show_table
from cake_core.errors import CheckpointError


@click.command()
@click.argument("model")
def pull(model: str) -> None:
    """Download a model from the hub, or go on with a download that was interrupted.

    MODEL is org/name, org/name:Q4_K_M or org/name/file.gguf. Only the files that are needed are fetched.
    """
    from cake_core.hub import pull as download
    from cake_core.models import HubId

    hub_id = HubId.parse(model)
    if hub_id is None:
        raise CheckpointError(f"{model!r} is not a hub id; write org/name, org/name:Q4_K_M or org/name/file.gguf")
    with Bars("downloading") as bars:
        checkpoint = download(hub_id, lambda done, total: bars.update(str(hub_id), done, total))
    note(f"{hub_id} is in {checkpoint.path}")


@click.command("list")
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_models(folders: tuple[Path, ...], as_json: bool) -> None:
    """List the models of the hub's cache and in FOLDERS."""
    from cake_core.models import list_models as find

    found = find(folders)
    if as_json:
        show_json(
            [
                {
                    "model": m.reference,
                    "path": str(m.path),
                    "bytes": m.nbytes,
                    "format": m.format,
                    "status": m.status,
                    "detail": m.detail,
                }
                for m in found
            ]
        )
        return
    if not found:
        note("no models here yet; `cake pull org/name` downloads one")
        return
    rows = [(m.reference, human_bytes(m.nbytes), m.format or "-", m.status, m.detail) for m in found]
    show_table(("model", "size", "format", "status", ""), rows, right=(1,))


@click.command()
@click.argument("model")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def rm(model: str, yes: bool) -> None:
    """Delete a model from the hub's cache."""
    from cake_core.models import remove

    if not yes:
        click.confirm(f"delete {model} from the cache?", abort=True, err=True)
    note(f"{model} is gone, {human_bytes(remove(model))} freed")


def download_missing(reference: str) -> None:
    """Downloads, with a bar, the hub model that a reference means, unless it is here; other references are left alone.

    The empty reference is the default model; when that cannot be had the resolver says so, naming every way to get it.
    """
    from cake_core.hub import pull as download
    from cake_core.models import DEFAULT_MODEL, HubId, cached, packaged_default

    hub_id = HubId.parse(reference or DEFAULT_MODEL)
    if hub_id is None or (reference and Path(reference).exists()) or cached(hub_id) is not None:
        return
    if not reference and packaged_default() is not None:
        return
    note(f"{hub_id} is not on this machine yet")
    try:
        with Bars("downloading") as bars:
            download(hub_id, lambda done, total: bars.update(str(hub_id), done, total))
    except CheckpointError:
        if reference:
            raise
