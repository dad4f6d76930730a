"""A real server in a thread, on a port of its own: for tests of this package and of whoever builds on it."""

from __future__ import annotations

import asyncio
import threading
import time
from types import TracebackType

from cake_core.transport import Address
from cake_server.serve import bind, make_server
from cake_server.service import Runtime, Service
from cake_server.settings import Settings

START_TIMEOUT = 10.0


class LiveServer:
    """Serves over loopback until `stop`. Without a runtime it is a server whose model is still loading."""

    def __init__(self, runtime: Runtime | None = None, settings: Settings | None = None, name: str = "") -> None:
        self.service = Service(settings or Settings(), name)
        if runtime is not None:
            self.service.ready(runtime)
        self._server = make_server(self.service)
        listener = bind(Address.parse("127.0.0.1:0"))
        self.port: int = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._server.serve([listener])), name="live-server", daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + START_TIMEOUT
        while not self._server.started:
            if time.monotonic() > deadline or not self._thread.is_alive():
                raise TimeoutError("the server did not start")
            time.sleep(0.005)

    def stop(self) -> float:
        """Ends it as a signal would; returns the seconds that took. The runtime is left to who made it. Idempotent."""
        begun = time.monotonic()
        self._server.should_exit = True
        self._thread.join(10.0)
        if self._thread.is_alive():
            raise TimeoutError("the server did not stop")
        return time.monotonic() - begun

    def __enter__(self) -> LiveServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
