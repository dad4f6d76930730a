"""What machines and the links between them were measured to do: what `planners` decides by.

A worker measures its own devices (`Backend.probe`) and tells them as a `NodeProfile`; whoever holds the links measures those;
the master puts both together as a `ClusterProfile`. Everything is in seconds, bytes and operations, plain numbers and text,
so that a profile travels as CBOR and lies in a file as JSON: `x == X.from_fields(x.as_fields())`. A profile may be written by
hand as well, to plan for machines that one does not have yet (`cake topology plan --profiles FILE`)::

    {"master": {"name": "master", "devices": [{"device": "cpu", "memory_free": 8e9, "bandwidth": 25e9}]},
     "nodes": [{"name": "tower", "devices": [{"device": "cuda:0", "memory_free": 23e9, "bandwidth": 9e11, "overhead": 1e-4}]}],
     "links": [{"between": ["master", "tower"], "round_trip": 0.0003, "rate": 117e6}]}

Numbers come from other machines and from people: each is checked, and what is wrong is named with its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from cake_core.errors import ConfigError
from cake_core.topology import MASTER

if TYPE_CHECKING:
    from cake_core.model import LoadOptions

Fields = Mapping[str, Any]

MOST_DEVICES, MOST_NODES = 64, 1024
"""Limits of what is read from a peer or a file."""


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """One device of a node as it really serves a stage.

    Attributes:
        device: as `LoadOptions.device` names it: `cpu`, `cuda:0`, `mps`.
        dtype: what it computes in when nobody asks for another (`--dtype auto`); empty where that depends on the model.
        memory_total: bytes it has; 0 where unknown.
        memory_free: bytes that weights and KV cache may take.
        bandwidth: bytes/s of weights that a decode step reads at batch 1.
        overhead: seconds that a call of a stage takes beside its layers.
        layer_overhead: seconds that a layer takes in a decode step beside reading its weights.
        flops: floating-point operations/s of prompt chunks, by the width of the weights (below).
        rates: as `bandwidth`, by the width of the weights, where the width makes a difference. A width is a dtype
            (`f32`, `bf16`, `f16`) or `int8`, `int4` for weights of about 8 and 4 bits.
        model: what people call it, such as `NVIDIA H100 80GB`.
    """

    device: str
    memory_free: int
    bandwidth: float
    dtype: str = ""
    memory_total: int = 0
    overhead: float = 0.0
    layer_overhead: float = 0.0
    flops: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    model: str = ""

    def __post_init__(self) -> None:
        _check(bool(self.device), "a device needs a name")
        _check(self.bandwidth > 0, f"device {self.device!r}: bandwidth must be more than 0")
        _check(
            all(value > 0 for value in (*self.flops.values(), *self.rates.values())), f"{self.device!r}: rates must be positive"
        )
        _check(
            min(self.memory_free, self.memory_total, self.overhead, self.layer_overhead) >= 0,
            f"{self.device!r}: negative number",
        )

    def as_fields(self) -> dict[str, Any]:
        return {
            "device": self.device, "model": self.model, "dtype": self.dtype,
            "memory_total": self.memory_total, "memory_free": self.memory_free, "bandwidth": self.bandwidth,
            "overhead": self.overhead, "layer_overhead": self.layer_overhead,
            "flops": dict(self.flops), "rates": dict(self.rates),
        }  # fmt: skip

    @classmethod
    def from_fields(cls, fields: Fields, where: str = "a device") -> DeviceProfile:
        """Raises ConfigError naming what is wrong."""
        _known(fields, cls.__dataclass_fields__, where)
        return cls(
            device=_text(fields, "device", where),
            memory_free=int(_number(fields, "memory_free", where)),
            bandwidth=_number(fields, "bandwidth", where),
            dtype=_text(fields, "dtype", where, ""),
            memory_total=int(_number(fields, "memory_total", where, 0)),
            overhead=_number(fields, "overhead", where, 0),
            layer_overhead=_number(fields, "layer_overhead", where, 0),
            flops=_numbers(fields, "flops", where),
            rates=_numbers(fields, "rates", where),
            model=_text(fields, "model", where, ""),
        )


@dataclass(frozen=True, slots=True)
class NodeProfile:
    """One machine: its devices, in the order in which it fills them: the fastest first, where whoever named them knew.

    `measured_at` is seconds since 1970 (0: written by hand). `host` is where the node is reached, empty when it dials.
    """

    name: str
    devices: tuple[DeviceProfile, ...]
    measured_at: float = 0.0
    host: str = ""

    def __post_init__(self) -> None:
        _check(bool(self.name), "a node needs a name")
        names = [device.device for device in self.devices]
        _check(len(set(names)) == len(names), f"node {self.name!r} names a device twice")
        _check(bool(names), f"node {self.name!r} has no device")

    @property
    def memory_free(self) -> int:
        return sum(device.memory_free for device in self.devices)

    def renamed(self, name: str) -> NodeProfile:
        """The same machine under another name: a worker's own may be taken, and the master's is always `master`."""
        return replace(self, name=name)

    def as_fields(self) -> dict[str, Any]:
        devices = [device.as_fields() for device in self.devices]
        return {"name": self.name, "devices": devices, "measured_at": self.measured_at, "host": self.host}

    @classmethod
    def from_fields(cls, fields: Fields, where: str = "a node") -> NodeProfile:
        """Raises ConfigError naming what is wrong."""
        _known(fields, cls.__dataclass_fields__, where)
        name = _text(fields, "name", where)
        devices = _list(fields, "devices", f"node {name!r}", MOST_DEVICES)
        return cls(
            name,
            tuple(DeviceProfile.from_fields(entry, f"node {name!r}, device {index}") for index, entry in enumerate(devices)),
            _number(fields, "measured_at", f"node {name!r}", 0),
            _text(fields, "host", f"node {name!r}", ""),
        )


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """The way between two nodes, as messages of a decode step see it (encryption and framing inside).

    Attributes:
        round_trip: seconds from sending a small request to having its answer.
        rate: bytes/s of large messages, one way.
    """

    round_trip: float
    rate: float

    def __post_init__(self) -> None:
        _check(self.round_trip >= 0 and self.rate > 0, f"a link cannot have {self.round_trip:g} s and {self.rate:g} bytes/s")

    def one_way(self, nbytes: float) -> float:
        """Seconds until a message of that size is there."""
        return self.round_trip / 2 + nbytes / self.rate

    def as_fields(self) -> dict[str, Any]:
        return {"round_trip": self.round_trip, "rate": self.rate}

    @classmethod
    def from_fields(cls, fields: Fields, where: str = "a link") -> LinkProfile:
        return cls(_number(fields, "round_trip", where), _number(fields, "rate", where))


@dataclass(frozen=True, slots=True)
class ClusterProfile:
    """The master, the workers, and the links: from the master to each worker, and between workers where known.

    A link holds for both directions and is found under either order of its names. Two workers whose link nobody measured are
    taken to be as far apart as the farther of them is from the master.
    """

    master: NodeProfile
    nodes: tuple[NodeProfile, ...] = ()
    links: Mapping[tuple[str, str], LinkProfile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.master.name == MASTER, f"the master's profile is called {MASTER!r}, not {self.master.name!r}")
        names = [node.name for node in (self.master, *self.nodes)]
        for name in names:
            _check(names.count(name) == 1, f"two nodes are called {name!r}; start one with another --name")
        for pair in self.links:
            _check(
                set(pair) <= set(names) and len(set(pair)) == 2, f"a link between {' and '.join(pair)}, which are no two nodes"
            )
        for node in self.nodes:
            _check(self._measured(MASTER, node.name) is not None, f"nothing is known of the link to {node.name!r}")

    def node(self, name: str) -> NodeProfile:
        for node in (self.master, *self.nodes):
            if node.name == name:
                return node
        raise ConfigError(f"no profile of node {name!r}; there are {', '.join(n.name for n in (self.master, *self.nodes))}")

    def link(self, one: str, other: str) -> LinkProfile:
        """The link between two different nodes."""
        found = self._measured(one, other)
        if found is not None:
            return found
        a, b = self.link(MASTER, one), self.link(MASTER, other)
        return LinkProfile(max(a.round_trip, b.round_trip), min(a.rate, b.rate))

    def _measured(self, one: str, other: str) -> LinkProfile | None:
        return self.links.get((one, other)) or self.links.get((other, one))

    def as_fields(self) -> dict[str, Any]:
        links = [{"between": list(pair), **link.as_fields()} for pair, link in self.links.items()]
        return {"master": self.master.as_fields(), "nodes": [node.as_fields() for node in self.nodes], "links": links}

    @classmethod
    def from_fields(cls, fields: Fields, where: str = "the profiles") -> ClusterProfile:
        """Raises ConfigError naming what is wrong."""
        _known(fields, cls.__dataclass_fields__, where)
        links = {}
        for index, entry in enumerate(_list(fields, "links", where, MOST_NODES**2)):
            here = f"{where}, link {index}"
            _known(entry, ("between", "round_trip", "rate"), here)
            between = _list(entry, "between", here, 2)
            _check(len(between) == 2 and all(isinstance(name, str) for name in between), f"{here}: between needs two names")
            links[(between[0], between[1])] = LinkProfile.from_fields(entry, here)
        nodes = _list(fields, "nodes", where, MOST_NODES)
        master = NodeProfile.from_fields(fields.get("master") or {}, f"{where}, master")
        return cls(master, tuple(NodeProfile.from_fields(entry, f"{where}, node {i}") for i, entry in enumerate(nodes)), links)


@runtime_checkable
class Profiler(Protocol):
    """What a backend may offer beside its contract: it knows how fast a device runs its stages."""

    name: str

    def profile(self, options: LoadOptions, known: DeviceProfile | None = None) -> DeviceProfile:
        """The device of `options` (`device`, `threads`), measured within seconds and without a checkpoint.

        Measure what a stage really does: hidden states from the host and back, weights at the widths the device has a way of
        its own for. `known` is what an earlier call gave for this device: then nothing is measured and only the free memory is
        looked up. Raises ConfigError for a device that is not there.
        """


def _check(true: bool, otherwise: str) -> None:
    if not true:
        raise ConfigError(otherwise)


def _known(fields: Any, names: Any, where: str) -> None:
    _check(isinstance(fields, Mapping), f"{where}: expected names and values, not {type(fields).__name__}")
    for name in fields:
        _check(name in names, f"{where}: unknown {name!r}; known are {', '.join(names)}")


def _number(fields: Fields, name: str, where: str, default: float | None = None) -> float:
    value = fields.get(name, default)
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    _check(good, f"{where}: {name} must be a number of at least 0, not {value!r}")
    return float(value)


def _text(fields: Fields, name: str, where: str, default: str | None = None) -> str:
    value = fields.get(name, default)
    _check(isinstance(value, str) and len(value) <= 256, f"{where}: {name} must be a short text, not {value!r}")
    return str(value)


def _numbers(fields: Fields, name: str, where: str) -> dict[str, float]:
    values = fields.get(name, {})
    _check(isinstance(values, Mapping) and len(values) <= 64, f"{where}: {name} must map widths to numbers")
    return {str(key): _number(values, key, f"{where}, {name}") for key in values}


def _list(fields: Fields, name: str, where: str, most: int) -> Sequence[Any]:
    values = fields.get(name, ())
    _check(isinstance(values, list | tuple) and len(values) <= most, f"{where}: {name} must be a list of at most {most}")
    return list(values)
