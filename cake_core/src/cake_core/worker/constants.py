"""Constants of image requests, as one master sent them: once each, named by their content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cake_core.errors import StageError
from cake_core.model import Tensor

MOST_BYTES = 1024 * 1024 * 1024
"""Bytes kept for one master."""


class Constants:
    """By the number of the request, then by content."""

    def __init__(self) -> None:
        self._kept: dict[int, dict[bytes, Tensor]] = {}
        self._nbytes = 0

    def remember(self, image: int, ids: Mapping[str, Any], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of a call, by name: `fresh` ones, kept from now on, and others that came before. Raises StageError for what
        never came, and for too many bytes."""
        kept = self._kept.setdefault(image, {})
        for name, tensor in fresh.items():
            if not isinstance(ids.get(name), bytes):
                raise StageError(f"constant {name!r} has no id")
            if ids[name] not in kept:
                self._nbytes += tensor.nbytes
                kept[ids[name]] = tensor
        if self._nbytes > MOST_BYTES:
            raise StageError(f"constants of more than {MOST_BYTES} bytes at once")
        missing = [name for name, key in ids.items() if key not in kept]
        if missing:
            raise StageError(f"constants {', '.join(missing)} were never sent")
        return {name: kept[key] for name, key in ids.items()}

    def forget(self, image: int) -> None:
        self._nbytes -= sum(tensor.nbytes for tensor in self._kept.pop(image, {}).values())

    @property
    def images(self) -> list[int]:
        """The requests that have some."""
        return list(self._kept)
