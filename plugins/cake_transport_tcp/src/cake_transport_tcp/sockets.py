"""What differs between operating systems and address families: names, options, connecting, listening."""

from __future__ import annotations

import contextlib
import errno
import queue
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from cake_core.errors import ConfigError, NodeUnreachable
from cake_core.transport import Address

BACKLOG = 1024
_Info = tuple[socket.AddressFamily, Any]


@dataclass(frozen=True, slots=True)
class Timers:
    """When the system itself gives a silent connection up, in whole seconds. Core's pings notice a hung process earlier;
    these end what even pings cannot: a write into a cut cable."""

    idle: int = 4
    interval: int = 2
    probes: int = 3
    unacknowledged: int = 30


def tune(sock: socket.socket, timers: Timers) -> None:
    """No delay for small messages; keepalive and user timeout as far as this system has them."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    wanted = {
        "TCP_KEEPIDLE": timers.idle,
        "TCP_KEEPALIVE": timers.idle,  # macOS' name of the same
        "TCP_KEEPINTVL": timers.interval,
        "TCP_KEEPCNT": timers.probes,
        "TCP_USER_TIMEOUT": timers.unacknowledged * 1000,
    }
    for name, value in wanted.items():
        option = getattr(socket, name, None)
        if option is not None:
            with contextlib.suppress(OSError):  # a compatibility layer may name an option and not have it
                sock.setsockopt(socket.IPPROTO_TCP, option, value)


def connect(address: Address, timeout: float) -> socket.socket:
    """A connection to the first of the host's addresses that answers. Raises NodeUnreachable."""
    deadline = time.monotonic() + timeout
    infos = _resolve(address, timeout)
    why = ""
    for index, (family, where) in enumerate(infos):
        # Each address that is left gets an equal share, so a silent first one does not eat the time of the others.
        share = max(0.05, (deadline - time.monotonic()) / (len(infos) - index))
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:  # this system has no such family
            why = str(error)
            continue
        sock.settimeout(share)
        try:
            sock.connect(where)
        except OSError as error:
            sock.close()
            why = _why(error)
            continue
        return sock
    raise NodeUnreachable(f"cannot reach {address}: {why}", address=str(address))


def bind(address: Address) -> list[socket.socket]:
    """Listening sockets for every address the host name has, all on one port. Raises ConfigError."""
    try:
        infos = _lookup(address.host, address.port, socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"cannot listen on {address}: {error.strerror or error}; use an address of this machine") from error
    sockets: list[socket.socket] = []
    port = address.port
    try:
        for family, where in infos:
            sockets.append(_bound(family, (where[0], port, *where[2:])))
            port = port or sockets[0].getsockname()[1]
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise ConfigError(f"cannot listen on {address}: {_remedy(error, address)}") from error
    return sockets


def name(where: Any) -> str:
    """A socket's address as `host:port`. An IPv4 peer of an IPv6 socket is named as the IPv4 address that it is."""
    host, port = where[0].removeprefix("::ffff:"), where[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bound(family: socket.AddressFamily, where: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            # Windows: SO_REUSEADDR would let another process take a port that is in use.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            # Elsewhere it only allows a restart while old connections die out.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # `::` serves IPv4 as well; any other IPv6 address is only itself.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(where[0] != "::"))
        sock.bind(where)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _lookup(host: str, port: int, flags: int = 0) -> list[_Info]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return list(dict.fromkeys((family, where) for family, _, _, _, where in found))


def _resolve(address: Address, timeout: float) -> list[_Info]:
    with contextlib.suppress(OSError):
        return _lookup(address.host, address.port, socket.AI_NUMERICHOST)
    # A name server that is silent blocks for many seconds; the system cannot be told how long we want to wait.
    answers: queue.SimpleQueue[list[_Info] | OSError] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(_lookup(address.host, address.port))
        except OSError as error:
            answers.put(error)

    threading.Thread(target=look_up, name="cake-tcp-resolve", daemon=True).start()
    try:
        answer = answers.get(timeout=timeout)
    except queue.Empty:
        answer = TimeoutError("the name was not resolved in time")
    if isinstance(answer, OSError):
        text = f"cannot reach {address}: unknown name {address.host!r} ({answer.strerror or answer}); use its IP address"
        raise NodeUnreachable(text, address=str(address))
    return answer


def _why(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused; start the worker there, and check the port"
    if isinstance(error, TimeoutError):
        return "no answer; is the machine on, and does its firewall let the port through?"
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return "no route to it; is it in this network?"
    return error.strerror or str(error)


def _remedy(error: OSError, address: Address) -> str:
    if error.errno == errno.EADDRINUSE:
        show = f"netstat -ano | findstr :{address.port}" if sys.platform == "win32" else f"lsof -i :{address.port}"
        return f"another process has port {address.port}; stop it (`{show}` names it) or choose another port"
    if error.errno == errno.EACCES:
        return f"port {address.port} is not allowed for this user; choose one above 1023"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{address.host} is no address of this machine; use one of its own, or 0.0.0.0 for all"
    return error.strerror or str(error)
