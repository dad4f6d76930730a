"""One node, several devices: which of its layers go on which, and the stages there as one.

Devices are filled in the order of `--device`, the fastest first. What a device has free is the backend's to say
(`profiles.Profiler`, asked for nothing else); where it does not, layers are shared out evenly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

from cake_core.checkpoint import Checkpoint
from cake_core.errors import CapacityError, ConfigError
from cake_core.model import LoadOptions, ModelInfo, Progress, TextBackend, TextStage
from cake_core.planners.costs import SPARE
from cake_core.profiles import DeviceProfile, Profiler
from cake_core.spreading import KV_SHARE
from cake_core.stages.relay import Relay

CONTEXTS = 4
"""Full contexts of KV cache at most when nobody said how much."""


def devices_of(options: LoadOptions) -> tuple[str, ...]:
    """The devices of `--device`, in the order in which they are filled. Raises ConfigError for a list that makes no sense."""
    devices = tuple(device.strip() for device in options.device.split(","))
    if len(devices) > 1 and ("auto" in devices or "" in devices or len(set(devices)) < len(devices)):
        raise ConfigError(f"--device {options.device}: name each device once, with commas, the fastest first, e.g. cuda:0,cpu")
    return devices


@dataclass(frozen=True, slots=True)
class Room:
    """What weights and KV cache may take on a device, in bytes."""

    device: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Share:
    """What goes on a device."""

    device: str
    layers: tuple[str, ...]


def filled(info: ModelInfo, layers: Sequence[str], rooms: Sequence[Room], kv_tokens: int) -> tuple[Share, ...]:
    """As many layers on each device as fit with their KV cache, in order; a device with room for none is passed over.

    Raises CapacityError when the last one has no room for the rest.
    """
    shares, left = [], tuple(layers)
    for room in rooms:
        used = accumulate(_bytes(info, name, kv_tokens) for name in left)
        count = sum(nbytes <= room.nbytes for nbytes in used)
        if count:
            shares.append(Share(room.device, left[:count]))
        left = left[count:]
    if left:
        needed = sum(_bytes(info, name, kv_tokens) for name in layers)
        there = ", ".join(f"{room.device} {room.nbytes / 1e9:.2f} GB" for room in rooms)
        raise CapacityError(
            f"{len(layers)} layers need {needed / 1e9:.2f} GB with {kv_tokens} tokens of KV cache, there is room on {there}; "
            f"{len(layers) - len(left)} of them would fit: give this node fewer layers, or use a smaller --context or --dtype"
        )
    return tuple(shares)


def even(info: ModelInfo, layers: Sequence[str], devices: Sequence[str]) -> tuple[Share, ...]:
    """About as many bytes of weights on each device."""
    sizes = [max(1, info.layer(name).nbytes) for name in layers]
    # A layer belongs where its middle lies, so that every device gets what is nearest to its part.
    middles = [stop - size / 2 for stop, size in zip(accumulate(sizes), sizes, strict=True)]
    places = [int(middle * len(devices) / sum(sizes)) for middle in middles]
    found = groupby(zip(places, layers, strict=True), key=lambda placed: placed[0])
    return tuple(Share(devices[place], tuple(name for _, name in placed)) for place, placed in found)


def fitting_tokens(info: ModelInfo, shares: Sequence[Share], rooms: Sequence[Room], least: int) -> int:
    """Tokens of KV cache, the same for every share: `least`, which there is room for, and more from a part of what is left."""
    nbytes, tokens = {room.device: room.nbytes for room in rooms}, CONTEXTS * info.context_length
    for share in shares:
        left = nbytes[share.device] - sum(_bytes(info, name, least) for name in share.layers)
        per_token = sum(info.layer(name).kv_bytes_per_token for name in share.layers)
        if per_token:
            tokens = min(tokens, least + int(left * KV_SHARE) // per_token)
    return max(least, tokens)


def _bytes(info: ModelInfo, name: str, kv_tokens: int) -> int:
    layer = info.layer(name)
    return layer.nbytes + kv_tokens * layer.kv_bytes_per_token


def rooms_of(backend: Profiler, options: LoadOptions) -> tuple[Room, ...]:
    """What is free now on each device. Raises ConfigError for two names of one device."""
    # With a profile at hand nothing is measured, only the free memory is looked up.
    known = {device: DeviceProfile(device, 0, 1.0) for device in devices_of(options)}
    found = [backend.profile(replace(options, device=device), profile) for device, profile in known.items()]
    rooms = {
        profile.device: Room(device, int(profile.memory_free * SPARE)) for device, profile in zip(known, found, strict=True)
    }
    if len(rooms) < len(found):
        raise ConfigError(f"--device {options.device} names a device twice: {', '.join(profile.device for profile in found)}")
    return tuple(rooms.values())


def load_text(
    backend: TextBackend,
    checkpoint: Checkpoint,
    info: ModelInfo,
    layers: Sequence[str],
    options: LoadOptions,
    progress: Progress | None = None,
) -> TextStage:
    """A run of layers as one stage, whatever devices it is on. Raises CapacityError before loading when they do not fit."""
    devices = devices_of(options)
    if len(devices) == 1:
        return backend.load(checkpoint, info, layers, options, progress)
    if isinstance(backend, Profiler):
        rooms, least = rooms_of(backend, options), options.kv_tokens or info.context_length
        shares = filled(info, layers, rooms, least)
        options = replace(options, kv_tokens=options.kv_tokens or fitting_tokens(info, shares, rooms, least))
    else:
        shares = even(info, layers, devices)
    parts: list[TextStage] = []
    try:
        for share, report in zip(shares, _reports(info, shares, progress), strict=True):
            parts.append(backend.load(checkpoint, info, share.layers, replace(options, device=share.device), report))
    except BaseException:
        for part in parts:
            part.shutdown()
        raise
    return parts[0] if len(parts) == 1 else Relay(parts)


def _reports(info: ModelInfo, shares: Sequence[Share], progress: Progress | None) -> Iterator[Progress | None]:
    """For each share what it reports to, which is the progress of all."""
    sizes = [sum(info.layer(name).nbytes for name in share.layers) for share in shares]
    for before in accumulate(sizes[:-1], initial=0):
        yield None if progress is None else _shifted(progress, before, sum(sizes))


def _shifted(progress: Progress, before: int, total: int) -> Progress:
    return lambda done, _: progress(min(before + done, total), total)


def component_options(options: LoadOptions, index: int) -> LoadOptions:
    """How to load the component of an image model that comes as number `index`: whole ones go round the devices."""
    devices = devices_of(options)
    return replace(options, device=devices[index % len(devices)])
