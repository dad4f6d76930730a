"""What cake-llama offers to Cake."""

from __future__ import annotations

from collections.abc import Iterable

from cake_core import hookimpl
from cake_core.checkpoint import Checkpoint
from cake_core.model import Backend


@hookimpl
def cake_register_backends() -> Iterable[Backend]:
    from cake_llama.backend import LlamaBackend

    return (LlamaBackend(),)


@hookimpl
def cake_resolve_checkpoint(reference: str) -> Checkpoint | None:
    from cake_llama.random_model import PREFIX, RandomCheckpoint

    return RandomCheckpoint(reference.removeprefix(PREFIX)) if reference.startswith(PREFIX) else None
