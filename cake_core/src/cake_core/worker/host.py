"""What a guest needs of the worker that it is on, and its way back to a master."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from cake_core.links.link import Link
from cake_core.profiles import NodeProfile
from cake_core.transport import Channel
from cake_core.wire.protocol import Message
from cake_core.worker.hops import Forward
from cake_core.worker.serving import Serving
from cake_core.worker.tenant import Tenant

if TYPE_CHECKING:
    from cake_core.worker.guest import Guest

Again = Callable[[bytes], Channel]
"""`again(ticket)` dials a master once more that cannot dial this worker, and shows it the ticket."""


class Host(Protocol):
    """What a guest needs of its worker."""

    name: str

    @property
    def serving(self) -> Serving | None:
        """What is loaded now."""

    bare: bool
    profile: Callable[[str], NodeProfile] | None

    def report(self) -> dict[str, Any]: ...

    def claim(self, ticket: bytes, link: Link) -> Forward:
        """Who takes the batches that come over `link` with this ticket. Raises StageError for one that nobody gave."""

    def tenant(self) -> Tenant:
        """Who carries out assignments. Raises NodeMismatch where nobody does."""

    def holders(self, but: Guest) -> list[str]:
        """The other masters that are attached."""

    def join(self, again: Again | None, link: Link, message: Message) -> None:
        """Answers a JOIN once the master was dialled again. Raises StageError for one that this worker has not dialled."""

    def relieve(self, guest: Guest) -> None:
        """Ends the same master's former links, should that not have been noticed yet, so that its sessions are parked."""
