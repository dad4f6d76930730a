"""`cake cache`: the weights that masters sent to this machine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from cake_core.cli.console import human_bytes, human_seconds, note, parse_size, show_json, show_table

if TYPE_CHECKING:
    from cake_core.weights.views import View, Views


@click.group()
def cache() -> None:
    """Show or empty the cache of weights that other machines sent."""


@cache.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_cache(as_json: bool) -> None:
    """List what the cache holds, used last first."""
    held = views()
    found = held.list()
    if as_json:
        show_json([_fields(view) for view in found])
        return
    if not found:
        note("the cache is empty; `cake worker` fills it with the layers it is assigned")
        return
    rows = [
        (
            view.model,
            view.layers,
            human_bytes(view.nbytes),
            _state(view),
            f"{human_seconds(max(0.0, time.time() - view.used))} ago",
        )
        for view in found
    ]
    show_table(("model", "layers", "size", "state", "used"), rows, right=(2,))
    # Models share files, so that the sizes may add up to more.
    note(f"{human_bytes(held.nbytes())} in {held.store.folder}")


@cache.command()
@click.option("--max-size", required=True, metavar="SIZE", help="Leave at most this much, as 50GB.")
def prune(max_size: str) -> None:
    """Remove what was used longest ago until the rest fits."""
    freed = views().prune(parse_size(max_size))
    note(f"freed {human_bytes(freed)}")


@cache.command()
def clear() -> None:
    """Remove everything; a transfer that is on its way keeps what it has."""
    freed = views().prune(0)
    note(f"freed {human_bytes(freed)}")


def views() -> Views:
    from cake_core.config import load_options
    from cake_core.weights.store import Store
    from cake_core.weights.views import Views

    return Views(Store(load_options().cache_dir / "weights"))


def _state(view: View) -> str:
    return "complete" if view.nbytes >= view.total else f"{100 * view.nbytes // max(1, view.total)} %"


def _fields(view: View) -> dict[str, object]:
    return {
        "model": view.model,
        "layers": view.layers,
        "bytes": view.nbytes,
        "total": view.total,
        "path": str(view.path),
        "used": view.used,
    }
