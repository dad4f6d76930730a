"""The server process: the API is up at once and says 503 until the model is; a signal ends streams and then the process."""

from __future__ import annotations

import asyncio
import importlib
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any, cast

import uvicorn

from cake_core.errors import AuthenticationError, CakeError, ConfigError, NodeError, TransportError
from cake_core.transport import Address
from cake_server.app import create_app
from cake_server.protocol import http_protocol
from cake_server.service import Runtime, Service

log = logging.getLogger(__name__)

BACKLOG = 1024
GRACE = 3
"""Seconds that open connections get after a signal, once their streams have been ended."""
CLOSE_TIMEOUT = 1.5
RETRY = 1.0

Open = Callable[[], Runtime]
"""Opens the runtime, blocking; called again as long as a node is what it lacks."""


class ApiServer(uvicorn.Server):
    """uvicorn, which knows nothing of open streams, told to end them first."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.stop()
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            # A client that does not read what it is owed keeps its connection open for as long as it likes.
            cast("Any", connection).transport.abort()
        await asyncio.sleep(0)


def make_server(service: Service) -> ApiServer:
    config = uvicorn.Config(
        create_app(service),
        http=http_protocol(),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE,
        backlog=BACKLOG,
    )
    return ApiServer(config, service)


def bind(address: Address) -> socket.socket:
    """A listening socket. Raises ConfigError, saying why, when the address cannot be had."""
    try:
        family, kind, proto, _, target = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"--api: {address.host!r} is no address of this machine ({error.strerror})") from error
    listener = socket.socket(family, kind, proto)
    try:
        if hasattr(socket, "SO_REUSEADDR") and not hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)
        listener.listen(BACKLOG)  # whoever comes before the server has started waits instead of being refused
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {address.host}:{address.port}: {reason}; choose another with --api") from error
    return listener


class Process:
    """One `cake serve`: loads in a thread of its own while the API answers already."""

    def __init__(self, service: Service, open_runtime: Open, ready: Callable[[Runtime], None]) -> None:
        self._service, self._open, self._ready = service, open_runtime, ready
        self._server = make_server(service)
        self._stopping = threading.Event()
        self._error: BaseException | None = None

    def run(self, listener: socket.socket) -> None:
        """Serves until a signal. Raises what kept the model from loading, when that is not something time can mend."""
        loader = threading.Thread(target=self._load, name="cake-load", daemon=True)
        loader.start()
        try:
            with asyncio.Runner(loop_factory=_fast_loop()) as runner:
                runner.run(self._server.serve([listener]))
        finally:
            self._stopping.set()
            self._close_runtime()
        if self._error is not None:
            raise self._error

    def _load(self) -> None:
        try:
            runtime = self._open_patiently()
            if runtime is None:
                return
            self._service.ready(runtime)
            self._ready(runtime)
            if self._stopping.is_set():
                runtime.close()
        except BaseException as error:  # whatever it is, the main thread reports it
            self._error = error
            self._service.failed(error)
            self._server.should_exit = True

    def _open_patiently(self) -> Runtime | None:
        told = ""
        while not self._stopping.is_set():
            try:
                return self._open()
            except (NodeError, AuthenticationError, TransportError) as error:
                if str(error) != told:
                    told = str(error)
                    log.warning("waiting: %s", told)
                self._service.loading(told)
                self._stopping.wait(RETRY)
        return None

    def _close_runtime(self) -> None:
        """Bounded: a runtime that does not come to an end must not keep the process."""
        runtime = self._service.runtime
        if runtime is not None:
            closer = threading.Thread(target=_close, args=(runtime,), name="cake-close", daemon=True)
            closer.start()
            closer.join(CLOSE_TIMEOUT)


def _fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where `cake-server[speed]` is installed."""
    try:
        uvloop = importlib.import_module("uvloop")
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _close(runtime: Any) -> None:
    try:
        runtime.close()
    except CakeError as error:
        log.warning("while closing: %s", error)
