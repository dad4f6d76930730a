"""Hooks of cake-emoji: the image model that comes along."""

from cake_core import hookimpl
from cake_core.checkpoint import Checkpoint


@hookimpl
def cake_resolve_checkpoint(reference: str) -> Checkpoint | None:
    from cake_emoji.checkpoint import resolve

    return resolve(reference)
