"""What a master assigns to a worker that brought no model: which layers of which model, how to load them, the files they are
in, and who has these. A value that travels; `tenant` carries it out on the worker, `assigner` looks after it on the master."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import cbor2

from cake_core.errors import ConfigError, ProtocolError
from cake_core.model import LoadOptions
from cake_core.topology import compress
from cake_core.transport import Address
from cake_core.weights.manifest import FileSpec, parse_files

_OPTIONS: Mapping[str, tuple[type, ...]] = {
    "dtype": (str,),
    "context": (int, type(None)),
    "kv_tokens": (int, type(None)),
    "quantize": (str, type(None)),
    "kv_dtype": (str,),
}
"""Load options that are the model's, and so the master's to say. Device and threads are the worker's."""
_DEFAULTS = LoadOptions()
MAX_SOURCES = 64
MAX_LAYERS = 4096
WORDS = frozenset({"sd_version", "sd_scheduler", "sd_loop", "sd_parallel"})
"""Switches whose values are words of a list. Of no other may a value be text: it could name a file."""
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")


@dataclass(frozen=True, slots=True)
class Assignment:
    """`master` names who assigns, for people. `stages` are runs of layers, or components of an image model one by one.
    `sources` are workers that may have the files too; `ticket` is what links lent for the transfer show."""

    master: str
    model: str
    model_type: str
    stages: tuple[tuple[str, ...], ...]
    options: LoadOptions
    files: tuple[FileSpec, ...]
    sources: tuple[Address, ...] = field(default=(), compare=False)
    ticket: int = field(default=0, compare=False)

    @property
    def key(self) -> str:
        """What makes two assignments the same, whoever gives them."""
        fields = self.as_fields()
        same = {name: fields[name] for name in ("model_type", "stages", "options", "files")}
        return hashlib.blake2b(cbor2.dumps(same), digest_size=16).hexdigest()

    @property
    def layers(self) -> str:
        """The layers, for people."""
        return ", ".join(compress(tuple(layer for stage in self.stages for layer in stage)))

    def load_options(self, own: LoadOptions) -> LoadOptions:
        """How to load: the master's word for the model, the worker's for its device; a dtype that the worker chose stays."""
        dtype = own.dtype if self.options.dtype == "auto" else self.options.dtype
        return replace(self.options, dtype=dtype, device=own.device, threads=own.threads)

    def as_fields(self) -> dict[str, Any]:
        """Raises ConfigError for options that only make sense on the master's own disk."""
        extra = dict(self.options.extra)
        for name, value in extra.items():
            if not _plain(name, value):
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} cannot be assigned to workers; start them with --model and {option} themselves")
        options = {name: getattr(self.options, name) for name in _OPTIONS}
        return {
            "master": self.master,
            "model": self.model,
            "model_type": self.model_type,
            "stages": [list(stage) for stage in self.stages],
            "options": {**options, "extra": extra},
            "files": [file.as_fields() for file in self.files],
            "sources": [str(source) for source in self.sources],
            "ticket": self.ticket,
        }

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Assignment:
        """Raises ProtocolError for what no master of ours would say."""
        stages = tuple(_stage(stage) for stage in fields["stages"])
        if not stages or sum(map(len, stages)) > MAX_LAYERS:
            raise ProtocolError("an assignment of no layers, or of too many")
        sources = fields["sources"]
        if len(sources) > MAX_SOURCES or not all(isinstance(source, str) and len(source) < 300 for source in sources):
            raise ProtocolError("an assignment with impossible sources")
        try:
            addresses = tuple(Address.parse(source) for source in sources)
            options = _options(fields["options"])
        except ConfigError as error:
            raise ProtocolError(f"an assignment that cannot be: {error}") from error
        return cls(
            fields["master"][:100],
            fields["model"][:200],
            fields["model_type"],
            stages,
            options,
            parse_files(fields["files"]),
            addresses,
            fields["ticket"],
        )


def _plain(name: str, value: Any) -> bool:
    """Whether a switch means the same on every machine."""
    if isinstance(value, bool | int | float):
        return True
    return name in WORDS and isinstance(value, str) and _WORD.fullmatch(value) is not None


def _stage(stage: Any) -> tuple[str, ...]:
    if not isinstance(stage, list) or not stage or not all(isinstance(layer, str) and len(layer) < 200 for layer in stage):
        raise ProtocolError("a stage of an assignment is a list of layers")
    return tuple(stage)


def _options(values: Mapping[str, Any]) -> LoadOptions:
    known: dict[str, Any] = {}
    for name, kinds in _OPTIONS.items():
        value = values.get(name, getattr(_DEFAULTS, name))
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ProtocolError(f"an assignment with an impossible {name}")
        known[name] = value
    extra = values.get("extra", {})
    if not isinstance(extra, dict) or not all(_plain(str(name), value) for name, value in extra.items()):
        raise ProtocolError("an assignment with impossible options")
    return LoadOptions(**known, extra={str(name): value for name, value in extra.items()})
