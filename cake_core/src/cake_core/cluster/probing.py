"""Measures this machine for the planner, once: what a backend found is kept in the cache folder and only free memory is asked
anew. What a profile holds is said in `profiles`, how it is found is the backend's business (`profiles.Profiler`)."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cake_core import __version__
from cake_core.errors import CakeError, ConfigError
from cake_core.model import Backend, LoadOptions
from cake_core.plugins import Plugins
from cake_core.profiles import DeviceProfile, NodeProfile, Profiler
from cake_core.stages.devices import devices_of

log = logging.getLogger(__name__)

FILE = "profiles.json"


@dataclass(frozen=True, slots=True)
class Prober:
    """Measures with `options` (device, threads). `otherwise` gives a device for backends that measure nothing themselves."""

    plugins: Plugins
    options: LoadOptions
    folder: Path
    otherwise: Callable[[], DeviceProfile]

    def node(self, name: str, backend: str = "") -> NodeProfile:
        """This machine for models of a backend; without one what was measured last, for any."""
        kept = _read(self.folder / FILE)
        if not backend:
            return self._last(name, kept)
        found = self.plugins.backends.get(backend)
        if not isinstance(found, Profiler):
            return NodeProfile(name, (self.otherwise(),), time.time())
        try:
            devices = tuple(self._device(found, device, kept) for device in devices_of(self.options))
        except (CakeError, ImportError) as error:
            log.warning("cannot measure for %s: %s", backend, error)
            devices = (self.otherwise(),)
        return NodeProfile(name, devices, time.time())

    def _device(self, backend: Backend, device: str, kept: dict[str, Any]) -> DeviceProfile:
        assert isinstance(backend, Profiler)  # noqa: S101 - the caller has looked
        key = "/".join((platform.node(), __version__, backend.name, device, str(self.options.threads or "auto")))
        known = _parsed(kept.get(key))
        found = backend.profile(replace(self.options, device=device), known)
        if known is None:
            kept[key] = {**found.as_fields(), "measured_at": time.time()}
            _write(self.folder / FILE, kept)
        return found

    def _last(self, name: str, kept: dict[str, Any]) -> NodeProfile:
        """The latest of this machine, with its free memory of now where that is the host's."""
        prefix = f"{platform.node()}/{__version__}/"
        own = [fields for key, fields in kept.items() if key.startswith(prefix) and _parsed(fields) is not None]
        known = _parsed(max(own, key=lambda fields: fields.get("measured_at", 0), default=None))
        now = self.otherwise()
        if known is None:
            return NodeProfile(name, (now,), time.time())
        return NodeProfile(
            name, (replace(known, memory_free=now.memory_free) if known.device == "cpu" else known,), time.time()
        )


def _parsed(fields: Any) -> DeviceProfile | None:
    """What was kept, None for what is not a profile (of another version, or damaged)."""
    if not isinstance(fields, dict):
        return None
    try:
        return DeviceProfile.from_fields({name: value for name, value in fields.items() if name != "measured_at"})
    except ConfigError as error:
        log.info("measured again: %s", error)
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.info("%s is not used: %s", path, error)
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, kept: dict[str, Any]) -> None:
    """Whole or not at all: several processes may measure at once, and the last one wins."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(kept, indent=1), "utf-8")
        part.replace(path)
    except OSError as error:
        log.warning("what was measured is not kept: %s", error)
