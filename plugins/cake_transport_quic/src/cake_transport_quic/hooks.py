"""What this plugin tells Cake."""

from __future__ import annotations

from collections.abc import Iterable

from cake_core.hookspecs import hookimpl
from cake_core.transport import Transport


@hookimpl
def cake_register_transports() -> Iterable[Transport]:
    from cake_transport_quic.transport import QuicTransport

    return [QuicTransport()]
