"""Connecting with the cluster key that this process finds or makes: what `cake run`, `serve` and `worker` use."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from cake_core.config import load_options
from cake_core.errors import CakeError
from cake_core.gate import Gate
from cake_core.hello import check_hello, make_hello
from cake_core.keys import ClusterKey, obtain_key
from cake_core.plugins import Plugins
from cake_core.security import dial, listen
from cake_core.transport import Address, Channel

log = logging.getLogger(__name__)


def dialer(plugins: Plugins, cluster_key: str | None, insecure: bool) -> Callable[[Address, float], Channel]:
    """`dial(address, timeout)`: an authenticated channel to a process of the same protocol version.

    `cluster_key` is what `--cluster-key` said. The key is looked up, or made, when first dialled. `dial` raises what
    `security.dial` does, PluginError for a scheme nobody serves, NodeMismatch for another protocol version.
    """
    key = functools.cache(lambda: _key(cluster_key, insecure))

    def connect(address: Address, timeout: float) -> Channel:
        channel, hello = dial(plugins.transport(address.scheme), address, key(), make_hello(), timeout)
        try:
            check_hello(hello, channel.peer)
        except CakeError:
            channel.abort()
            raise
        return channel

    return connect


def open_gate(plugins: Plugins, address: Address, cluster_key: str | None, insecure: bool) -> Gate:
    """Listens; `accept` returns only peers with the cluster key and our protocol version. Raises ConfigError, PluginError."""
    return listen(plugins.transport(address.scheme), address, _key(cluster_key, insecure), make_hello(), check_hello)


def _key(cluster_key: str | None, insecure: bool) -> ClusterKey | None:
    if insecure:
        return None
    key = obtain_key(cluster_key, load_options().config_dir)
    if key.made:
        log.warning(
            "made a cluster key and kept it in %s. On every other machine of this cluster run once: cake key join %s",
            key.source,
            key.text,
        )
    return key
