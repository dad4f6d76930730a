"""What the engine is told of the cluster."""

from __future__ import annotations

from typing import Protocol

from cake_core.errors import CakeError


class Watch(Protocol):
    """Whether every node is there; the engine waits up to `rejoin` seconds for one that is not."""

    @property
    def rejoin(self) -> float: ...
    @property
    def draining(self) -> bool:
        """Whether a node is about to leave and waits for its sessions to end."""

    def missing(self) -> CakeError | None: ...
