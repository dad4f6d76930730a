"""The user's topology file: node -> host, description, layers. Its form is checked here; `placement` fits it to a model.

::

    linux_server_1:
      host: 'linux_server.host:10128'
      description: 'NVIDIA Titan X Pascal (12GB)'
      layers:
        - 'model.layers.0-5'       # an inclusive range
        - 'model.norm'
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cake_core.errors import ConfigError, TopologyError
from cake_core.transport import Address

MASTER = "master"
"""Name of the node that owns the request and every layer no worker was given. No worker may have it."""

_RANGE = re.compile(r"^(.*[^\d])(\d+)-(\d+)$")
_KEYS = ("host", "description", "layers")
_MAX_RANGE = 100_000


@dataclass(frozen=True, slots=True)
class Node:
    """A worker as the topology names it; `layers` is expanded. `host` None: the worker dials the master (`--join`)."""

    name: str
    host: Address | None
    layers: tuple[str, ...]
    description: str = ""


@dataclass(frozen=True, slots=True)
class Topology:
    nodes: tuple[Node, ...] = ()
    source: str = ""

    def node(self, name: str) -> Node:
        """Raises TopologyError, with the names there are, for one the file does not have."""
        for node in self.nodes:
            if node.name == name:
                return node
        names = ", ".join(node.name for node in self.nodes) or "none"
        close = difflib.get_close_matches(name, [node.name for node in self.nodes], 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise TopologyError(f"{self.source or 'the topology'} has no node {name!r}{hint} (it has: {names})")


def load_topology(path: Path) -> Topology:
    """Raises TopologyError for a file that cannot be read or is no topology, with line and remedy."""
    import yaml

    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise TopologyError(f"cannot read the topology {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TopologyError(f"the topology {path} is not UTF-8 text") from error
    try:
        data = yaml.load(text, _unique_key_loader(yaml))  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise TopologyError(f"{path} is not valid YAML: {str(error).replace(chr(10), ' ')}") from error
    return parse_topology({} if data is None else data, str(path))


def _unique_key_loader(yaml: Any) -> Any:
    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """SafeLoader that refuses a mapping with the same key twice, where YAML libraries take the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, str) and key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"found {key!r} twice", key_node.start_mark)
                if isinstance(key, str):
                    seen.add(key)
            return super().construct_mapping(node, deep)

    return Loader


def parse_topology(data: Any, source: str = "") -> Topology:
    """The topology in already parsed YAML. Raises TopologyError naming node and key."""
    where = source or "the topology"
    if not isinstance(data, Mapping):
        raise TopologyError(f"{where} must map node names to their host and layers, not be a {type(data).__name__}")
    nodes = tuple(_parse_node(where, name, entry) for name, entry in data.items())
    owners: dict[str, list[str]] = {}
    for node in nodes:
        for layer in node.layers:
            owners.setdefault(layer, []).append(node.name)
    for layer, names in owners.items():
        if len(set(names)) < len(names):
            raise TopologyError(f"{where}: node {names[0]!r} lists layer {layer!r} twice; remove one")
    return Topology(nodes, source)


def _parse_node(where: str, name: Any, entry: Any) -> Node:
    if not isinstance(name, str) or not name:
        raise TopologyError(f"{where}: node names are text, not {name!r}; put it in quotes")
    if name == MASTER:
        raise TopologyError(f"{where}: {MASTER!r} is the master's own name; call the node something else")
    if not isinstance(entry, Mapping):
        raise TopologyError(f"{where}: node {name!r} must have host and layers")
    for key in entry:
        if key not in _KEYS:
            close = difflib.get_close_matches(str(key), _KEYS, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f" (known: {', '.join(_KEYS)})"
            raise TopologyError(f"{where}: node {name!r} has an unknown key {key!r}{hint}")
    host, layers = entry.get("host"), entry.get("layers")
    if host is not None and not isinstance(host, str):
        raise TopologyError(f"{where}: node {name!r}: host must be text like 'name:10128', not {host!r}")
    if layers is None:
        layers = []
    if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
        raise TopologyError(f"{where}: node {name!r}: layers must be a list of names")
    try:
        address = None if host is None else Address.parse(host)
    except ConfigError as error:
        raise TopologyError(f"{where}: node {name!r}: {error}") from error
    expanded = tuple(layer for expression in layers for layer in expand(expression, where, name))
    return Node(name, address, expanded, str(entry.get("description") or ""))


def expand(expression: str, where: str = "the topology", node: str = "") -> Iterator[str]:
    """Layer names of one entry: `model.layers.0-5` is an inclusive range, anything else is a name."""
    match = _RANGE.match(expression)
    if match is None:
        yield expression
        return
    prefix, first, last = match[1], int(match[2]), int(match[3])
    if last < first:
        raise TopologyError(f"{where}: node {node!r}: range {expression!r} runs backwards; write {prefix}{last}-{first}")
    if last - first >= _MAX_RANGE:
        raise TopologyError(f"{where}: node {node!r}: range {expression!r} is too long")
    for index in range(first, last + 1):
        yield f"{prefix}{index}"


def compress(layers: tuple[str, ...]) -> list[str]:
    """The inverse of `expand`: consecutive numbered names become ranges, order is kept."""
    result: list[str] = []
    run: tuple[str, int, int] | None = None
    for layer in (*layers, ""):
        match = re.match(r"^(.*[^\d])(\d+)$", layer)
        if match and run and match[1] == run[0] and int(match[2]) == run[2] + 1:
            run = (run[0], run[1], run[2] + 1)
            continue
        if run:
            result.append(f"{run[0]}{run[1]}" if run[1] == run[2] else f"{run[0]}{run[1]}-{run[2]}")
        run = (match[1], int(match[2]), int(match[2])) if match else None
        if not match and layer:
            result.append(layer)
    return result
