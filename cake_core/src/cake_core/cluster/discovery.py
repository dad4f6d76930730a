"""Workers on the local network, found by multicast DNS (RFC 6762, 6763) with the package zeroconf (`cake-core[discover]`).

A worker announces its name, address and scheme, and no more: who may use it is decided by the cluster key, when it is dialled.
Anybody may announce anything, so what is found here is only a place to knock at.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from cake_core.transport import DEFAULT_SCHEME, Address

log = logging.getLogger(__name__)

SERVICE = "_cake._tcp.local."
SECONDS = 1.2
"""How long `browse` listens; less when everybody has answered."""
QUIET = 0.5
"""Seconds without a new answer after which `browse` has heard enough."""
MOST = 256
"""Workers that are listened to; a flood of announcements ends there."""


@dataclass(frozen=True, slots=True)
class Found:
    """A worker that announced itself: `addresses` are the ways to it, any of which may work from here."""

    name: str
    addresses: tuple[Address, ...]


class Announcement:
    """Keeps a worker announced until `close`."""

    def __init__(self, zeroconf: Any, info: Any) -> None:
        self._zeroconf, self._info = zeroconf, info

    def close(self) -> None:
        self._zeroconf.close()


def announce(name: str, address: Address) -> Announcement | None:
    """Announces a worker that listens at `address`. None, with a line in the log, where that is not possible: zeroconf is not
    installed, there is no network, or the address is only for this machine."""
    addresses = _own_addresses(address.host)
    if not addresses:
        return None
    try:
        from zeroconf import ServiceInfo, Zeroconf
    except ImportError:
        log.info("not announced: `pip install 'cake-core[discover]'` lets masters find this worker")
        return None
    label = name.replace(".", "-")[:60]
    properties = {"v": "1", "node": name[:100], "scheme": address.scheme}
    packed = [ipaddress.ip_address(text).packed for text in addresses]
    info = ServiceInfo(SERVICE, f"{label}.{SERVICE}", addresses=packed, port=address.port, properties=properties)
    try:
        zeroconf = Zeroconf()
        zeroconf.register_service(info, allow_name_change=True)
    except Exception as error:
        # Whatever a network without multicast makes of this: workers can be named with --workers as well.
        log.warning("not announced on the network: %s; masters need --workers HOST:PORT", error)
        return None
    return Announcement(zeroconf, info)


def browse(seconds: float = SECONDS) -> list[Found]:
    """The workers that answer within `seconds`; none where zeroconf is not installed or there is no network."""
    try:
        from zeroconf import ServiceBrowser, Zeroconf
    except ImportError:
        return []
    try:
        zeroconf = Zeroconf()
    except OSError as error:
        log.info("no multicast here: %s", error)
        return []
    listener = _Listener()
    with contextlib.closing(zeroconf):
        ServiceBrowser(zeroconf, SERVICE, cast("Any", listener))
        return listener.wait(seconds)


class _Listener:
    """What zeroconf calls, in its own thread."""

    def __init__(self) -> None:
        self._found: dict[str, Found] = {}
        self._changed = threading.Condition()

    def add_service(self, zeroconf: Any, kind: str, name: str) -> None:
        info = zeroconf.get_service_info(kind, name, timeout=500)
        found = None if info is None else _parse(name, info.port, info.parsed_addresses(), info.properties)
        with self._changed:
            if found is not None and len(self._found) < MOST:
                self._found[name] = found
                self._changed.notify_all()

    def update_service(self, zeroconf: Any, kind: str, name: str) -> None:
        self.add_service(zeroconf, kind, name)

    def remove_service(self, _zeroconf: Any, _kind: str, name: str) -> None:
        with self._changed:
            self._found.pop(name, None)

    def wait(self, seconds: float) -> list[Found]:
        until = time.monotonic() + seconds
        with self._changed:
            while (left := until - time.monotonic()) > 0:
                if not self._changed.wait(min(left, QUIET)) and self._found:
                    break
            return sorted(self._found.values(), key=lambda found: found.name)


def _parse(name: str, port: int, addresses: Sequence[str], properties: Any) -> Found | None:
    """What an announcement says; None for one that is not ours or makes no sense."""

    def said(key: bytes, default: str) -> str:
        value = properties.get(key)
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else default

    node, scheme = said(b"node", name.removesuffix(f".{SERVICE}"))[:100], said(b"scheme", DEFAULT_SCHEME)
    if not node.isprintable() or not scheme.isalnum() or not 0 < port < 65536:
        return None
    # IPv4 first: link-local IPv6 addresses need a zone that an address of ours does not have.
    usable = [text for text in addresses if not text.lower().startswith("fe80")]
    ordered = sorted(usable, key=lambda text: ":" in text)
    return Found(node, tuple(Address(text, port, scheme) for text in ordered)) if ordered else None


def _own_addresses(host: str) -> list[str]:
    """Where others reach a listener at `host`: the address itself, or, for 0.0.0.0 and ::, all of this machine's."""
    try:
        chosen = ipaddress.ip_address(host)
    except ValueError:
        return []  # a name: whoever chose it will have told it
    if chosen.is_loopback:
        return []
    if not chosen.is_unspecified:
        return [host]
    try:
        import ifaddr
    except ImportError:
        return []
    texts = [ip.ip if isinstance(ip.ip, str) else ip.ip[0] for adapter in ifaddr.get_adapters() for ip in adapter.ips]
    found = [text for text in texts if not ipaddress.ip_address(text).is_loopback]
    return [text for text in found if not ipaddress.ip_address(text).is_link_local]
