"""Finds plugins and asks them: the only place that calls a hook.

Entry points of the group `cake` are loaded each in its own try: a broken, misspelt or outdated plugin is reported by
`cake plugins` and skipped, and the rest go on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pluggy

from cake_core import hookspecs
from cake_core.errors import CheckpointError, ConfigError, PluginError, UnsupportedModel
from cake_core.model import BACKEND_API, Backend, ModelInfo
from cake_core.transport import TRANSPORT_API, Transport

if TYPE_CHECKING:
    import click

    from cake_core.checkpoint import Checkpoint
    from cake_core.config import Options
    from cake_core.events import ClusterEvent
    from cake_core.placement import Placement
    from cake_core.topology import Topology

log = logging.getLogger(__name__)

GROUP = "cake"


class _Versioned(Protocol):
    api: int


D = TypeVar("D", bound="_Versioned")


@dataclass(slots=True)
class PluginReport:
    """What became of one plugin, for `cake plugins`."""

    name: str
    distribution: str
    version: str
    error: str | None = None
    provides: list[str] = field(default_factory=list)


class Plugins:
    """The plugins of this process. An object, not a global: tests build their own with `entries=()`."""

    def __init__(self, entries: Iterable[EntryPoint] | None = None) -> None:
        self._manager = pluggy.PluginManager("cake")
        self._manager.add_hookspecs(hookspecs)
        self.reports: dict[str, PluginReport] = {}
        self._backends: dict[str, Backend] | None = None
        self._transports: dict[str, Transport] | None = None
        if os.environ.get("CAKE_TRACE_HOOKS"):
            self._manager.trace.root.setwriter(lambda text: log.warning("%s", text.rstrip()))
            self._manager.enable_tracing()
        from cake_core import builtin

        self.register("core", builtin)
        for entry in _selected(entry_points(group=GROUP) if entries is None else entries):
            self._load(entry)

    def register(self, name: str, plugin: Any) -> None:
        """Adds a plugin that is an object already. Raises PluginError for a hook implemented wrongly or one we do not have."""
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            if self._manager.get_plugin(name) is not None:
                self._manager.unregister(name=name)
            raise PluginError(f"plugin {name!r}: {error}".replace("\n", " ")) from error
        self.reports.setdefault(name, PluginReport(name, "", ""))

    def _load(self, entry: EntryPoint) -> None:
        distribution = entry.dist
        report = PluginReport(
            entry.name, distribution.name if distribution else "", distribution.version if distribution else ""
        )
        if entry.name in self.reports:
            report.error = f"another plugin is named {entry.name!r} already"
            self.reports[f"{entry.name} ({report.distribution or entry.value})"] = report
            return
        self.reports[entry.name] = report
        try:
            self.register(entry.name, entry.load())
        except Exception as error:
            # Anything at all may go wrong in foreign code; the report carries it to `cake plugins`.
            report.error = f"{type(error).__name__}: {error}"
            log.warning("plugin %s is skipped: %s", entry.name, report.error)

    def configure(self, options: Options) -> None:
        self._manager.hook.cake_configure.call_historic(kwargs={"options": options})

    def add_commands(self, cli: click.Group) -> None:
        """Lets each plugin add its commands; one that fails is reported and skipped."""
        for name, implementation in self._implementations("cake_register_commands"):
            try:
                implementation(cli)
            except Exception as error:
                self._failed(name, error)

    @property
    def backends(self) -> dict[str, Backend]:
        """Backends by name."""
        if self._backends is None:
            self._backends = self._collect("cake_register_backends", BACKEND_API, lambda b: b.name, "backend")
        return self._backends

    @property
    def transports(self) -> dict[str, Transport]:
        """Transports by scheme."""
        if self._transports is None:
            self._transports = self._collect("cake_register_transports", TRANSPORT_API, lambda t: t.scheme, "transport")
        return self._transports

    def transport(self, scheme: str) -> Transport:
        """Raises PluginError, naming what to install, for a scheme nobody serves."""
        found = self.transports.get(scheme)
        if found is None:
            have = ", ".join(f"{name}://" for name in self.transports) or "none"
            raise PluginError(
                f"no transport for {scheme}://; installed: {have}. `pip install cake-transport-{scheme}` may help, "
                "`cake plugins` shows what failed to load"
            )
        return found

    def backend_for(self, checkpoint: Checkpoint, model_type: str | None = None) -> Backend:
        """The backend that accepts a checkpoint. Raises UnsupportedModel naming its architecture and what is served,
        or the CheckpointError of a backend that could not tell."""
        candidates = [b for b in self.backends.values() if model_type in (None, b.model_type)]
        damage: CheckpointError | None = None
        for backend in candidates:
            try:
                if backend.accepts(checkpoint):
                    return backend
            except CheckpointError as error:  # what one kind of model lacks, another may not need
                damage = damage or error
        if damage is not None:
            raise damage
        names = ", ".join(b.name for b in candidates) or "none"
        raise UnsupportedModel(
            f"{checkpoint.path}: no installed backend serves {_architecture(checkpoint)} (installed {model_type or 'model'} "
            f"backends: {names}); `cake plugins` shows what each serves and what failed to load"
        )

    def resolve(self, reference: str | os.PathLike[str]) -> Checkpoint:
        """Raises CheckpointError for a reference nobody knows."""
        reference = str(reference)
        found: Checkpoint | None = self._manager.hook.cake_resolve_checkpoint(reference=reference)
        if found is None:
            raise CheckpointError(f"model {reference!r} is neither a folder, a file nor a hub id like org/name")
        return found

    def plan(self, model: ModelInfo, topology: Topology) -> Placement:
        """The placement, checked."""
        from cake_core.placement import check_placement

        placement: Placement = self._manager.hook.cake_plan_placement(model=model, topology=topology)
        check_placement(model, placement, topology)
        return placement

    def emit(self, event: ClusterEvent) -> None:
        """Tells every observer; their errors are logged."""
        for name, implementation in self._implementations("cake_on_event"):
            try:
                implementation(event)
            except Exception:
                log.exception("plugin %s failed in cake_on_event", name)

    def _implementations(self, hook: str) -> list[tuple[str, Callable[..., Any]]]:
        return [(impl.plugin_name, impl.function) for impl in getattr(self._manager.hook, hook).get_hookimpls()]

    def _collect(self, hook: str, api: int, key: Callable[[D], str], kind: str) -> dict[str, D]:
        found: dict[str, D] = {}
        for plugin, implementation in self._implementations(hook):
            try:
                for item in implementation():
                    _check(item, api, key(item), kind, found)
                    found[key(item)] = item
                    self.reports[plugin].provides.append(f"{kind} {key(item)}")
            except Exception as error:
                self._failed(plugin, error)
        return dict(sorted(found.items()))

    def _failed(self, plugin: str, error: Exception) -> None:
        self.reports[plugin].error = f"{type(error).__name__}: {error}"
        log.warning("plugin %s is skipped: %s", plugin, self.reports[plugin].error)


def _check(item: _Versioned, api: int, name: str, kind: str, found: dict[str, D]) -> None:
    if item.api != api:
        raise PluginError(
            f"{kind} {name!r} was written for contract {item.api}, this core has {api}; upgrade the older of the two"
        )
    if name in found:
        raise ConfigError(f"{kind} {name!r} is registered by two plugins; uninstall one")


def _selected(entries: Iterable[EntryPoint]) -> list[EntryPoint]:
    """Entry points left after `CAKE_PLUGINS` (only these) and `CAKE_PLUGINS_OFF` (not these), by name."""
    only, off = os.environ.get("CAKE_PLUGINS"), os.environ.get("CAKE_PLUGINS_OFF", "")
    allowed = None if only is None else {name.strip() for name in only.split(",") if name.strip()}
    blocked = {name.strip() for name in off.split(",")}
    chosen = [e for e in entries if (allowed is None or e.name in allowed) and e.name not in blocked]
    return sorted(chosen, key=lambda e: e.name)


def _architecture(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    for key in ("architectures", "general.architecture", "_class_name", "model_type"):
        value = config.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value:
            return f"architecture {value!r}"
    return "a model that does not name its architecture"
