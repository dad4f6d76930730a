"""Models by name: `v1-5`, `v2-1`, `xl`, `turbo`, hub ids whose owners deleted them, `random:xl`."""

from __future__ import annotations

from cake_core.checkpoint import Checkpoint
from cake_core.models import HubId, cached
from cake_sd.versions import MIRRORS, RANDOM, VERSIONS


def resolve(reference: str) -> Checkpoint | None:
    """What is in the cache under any of the names, else a download of the first; None for a reference that is no such name.

    Raises CheckpointError when the download fails, with the remedy.
    """
    if reference.startswith(RANDOM):
        from cake_core.config import load_options
        from cake_sd.randoms import resolve as make_up

        return make_up(reference, load_options().cache_dir)
    if reference in VERSIONS:
        names = VERSIONS[reference].repositories
    elif reference in MIRRORS:
        names = (MIRRORS[reference], reference)
    else:
        return None
    ids = [HubId(name) for name in names]
    for hub_id in ids:
        if (checkpoint := cached(hub_id)) is not None:
            return checkpoint
    from cake_core.hub import pull

    return pull(ids[0])
