from collections.abc import Iterable

from cake_core import hookimpl
from cake_core.transport import Transport


@hookimpl
def cake_register_transports() -> Iterable[Transport]:
    from cake_unix.transport import UnixTransport

    return [UnixTransport()]
