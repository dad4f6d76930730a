"""Which tensors of a batch a stage reads: the same where the master feeds it and where another worker does."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from cake_core.model import Tensor

EMBED = "model.embed_tokens"
HEAD = "lm_head"


def read_by(layers: Collection[str]) -> frozenset[str]:
    """Of the batch's tokens and targets and the hidden states of the stage before, what a stage with `layers` reads."""
    first, last = EMBED in layers, HEAD in layers
    read = {"tokens": first or last, "hidden": not first, "targets": last}
    return frozenset(name for name, wanted in read.items() if wanted)


def inputs_of(read: Collection[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of `tensors` those that are read."""
    return {name: tensor for name, tensor in tensors.items() if name in read}


def carried(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What goes past a stage untouched, because a later one may read it."""
    return {name: tensor for name, tensor in tensors.items() if name in ("tokens", "targets")}
