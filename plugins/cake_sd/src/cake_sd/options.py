"""The plugin's own switches, checked: of a process (`LoadOptions.extra`) and of a request (`ImageRequest.extra`)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cake_core.errors import CakeError, ConfigError, RequestError
from cake_core.model import LoadOptions
from cake_core.requests import ImageRequest
from cake_sd.layout import FOLDERS
from cake_sd.versions import SCHEDULERS, VERSIONS

LOOPS = ("master", "worker")
PARALLEL = ("images", "guidance")
PREVIEWS = ("decode", "fast")
MAX_BATCH = 16

_PATHS = {f"sd_{layer}": layer for layer in FOLDERS}
_TOKENIZERS = {"sd_tokenizer": "tokenizer", "sd_tokenizer_2": "tokenizer_2"}


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA file and how strongly it acts."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class SdOptions:
    """Switches of this process. `weights`: layer -> file that replaces the model's own. `config`: diffusers folder
    or hub id whose configuration a single file lacks."""

    version: str | None = None
    use_f16: bool | None = None
    width: int | None = None
    height: int | None = None
    weights: Mapping[str, Path] = field(default_factory=dict)
    tokenizers: Mapping[str, Path] = field(default_factory=dict)
    lora: tuple[Lora, ...] = ()
    loop: str = "master"
    parallel: str = "images"
    scheduler: str | None = None
    clip_skip: int | None = None
    long_prompts: bool = False
    attention_slice: int | None = None
    compile: bool = False
    config: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """Switches of one request. `batch`: images denoised in one call. `preview`: `decode` runs the autoencoder, `fast` a
    linear map that costs nothing."""

    version: str | None = None
    scheduler: str | None = None
    clip_skip: int | None = None
    batch: int = 1
    preview: str = "decode"
    long_prompts: bool = False
    trace: bool = False


_NAMES = frozenset(
    ("sd_version", "sd_use_f16", "sd_width", "sd_height", "sd_lora", "sd_loop", "sd_parallel", "sd_scheduler", "sd_clip_skip",
     "sd_long_prompts", "sd_sliced_attention_size", "sd_use_flash_attention", "sd_compile", "sd_config")
) | _PATHS.keys() | _TOKENIZERS.keys()  # fmt: skip
_ASKED = frozenset(("scheduler", "clip_skip", "batch", "preview", "long_prompts", "trace", "version"))


def process_options(options: LoadOptions) -> SdOptions:
    """Raises ConfigError for a switch there is not (with the nearest one) or a value that does not fit it.

    Names may leave out the `sd_` before them.
    """
    values = {key if key.startswith("sd_") else f"sd_{key}": value for key, value in options.extra.items()}
    unknown(values, _NAMES, "option", ConfigError)
    get = _Reader(values, ConfigError, "--")
    return SdOptions(
        version=get.choice("sd_version", tuple(VERSIONS)),
        use_f16=get.switch("sd_use_f16"),
        width=get.size("sd_width"),
        height=get.size("sd_height"),
        weights={layer: get.file(name) for name, layer in _PATHS.items() if values.get(name) is not None},
        tokenizers={part: get.file(name) for name, part in _TOKENIZERS.items() if values.get(name) is not None},
        lora=_loras(values.get("sd_lora")),
        loop=get.choice("sd_loop", LOOPS) or "master",
        parallel=get.choice("sd_parallel", PARALLEL) or "images",
        scheduler=get.choice("sd_scheduler", tuple(SCHEDULERS)),
        clip_skip=get.number("sd_clip_skip", 0, 100),
        long_prompts=bool(get.switch("sd_long_prompts")),
        attention_slice=get.number("sd_sliced_attention_size", 0, 4096),
        compile=bool(get.switch("sd_compile")),
        config=None if values.get("sd_config") is None else str(values["sd_config"]),
    )


def request_options(request: ImageRequest, process: SdOptions) -> Asked:
    """Raises RequestError for a switch there is not, or a value that does not fit it."""
    values = {key.removeprefix("sd_"): value for key, value in request.extra.items()}
    unknown(values, _ASKED, "request option", RequestError)
    get = _Reader(values, RequestError, "")
    version = get.choice("version", tuple(VERSIONS))
    if version is not None and process.version is not None and version != process.version:
        raise RequestError(f"this cluster serves {process.version}, not {version}; leave version out", "version")
    return Asked(
        version=version or process.version,
        scheduler=get.choice("scheduler", tuple(SCHEDULERS)) or process.scheduler,
        clip_skip=_first(get.number("clip_skip", 0, 100), process.clip_skip),
        batch=get.number("batch", 1, MAX_BATCH) or 1,
        preview=get.choice("preview", PREVIEWS) or "decode",
        long_prompts=bool(get.switch("long_prompts")) or process.long_prompts,
        trace=bool(get.switch("trace")),
    )


def unknown(values: Iterable[str], known: Iterable[str], what: str, error: type[CakeError]) -> None:
    """Raises `error` for the first of `values` that is not known, with the nearest one that is."""
    names = sorted(known)
    for value in values:
        if value not in names:
            close = difflib.get_close_matches(value, names, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"
            raise error(f"unknown image {what} {value!r}; {hint}")


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _loras(value: Any) -> tuple[Lora, ...]:
    entries = () if value is None else (value,) if isinstance(value, (str, Path)) else tuple(value)
    found = []
    for entry in entries:
        path, separator, scale = str(entry).rpartition("=")
        if not separator:
            path, scale = str(entry), "1"
        try:
            strength = float(scale)
        except ValueError:
            path, strength = str(entry), 1.0
        if not Path(path).is_file():
            raise ConfigError(f"--sd-lora: there is no file {path}; give a .safetensors file, with =SCALE behind it if need be")
        found.append(Lora(Path(path), strength))
    return tuple(found)


class _Reader:
    """Takes typed values out of a mapping whose values may be text, raising `error` with the name of the option."""

    def __init__(self, values: Mapping[str, Any], error: type[CakeError], prefix: str) -> None:
        self._values, self._error, self._prefix = values, error, prefix

    def _wrong(self, name: str, expected: str) -> CakeError:
        shown = f"{self._prefix}{name.replace('_', '-')}" if self._prefix else name
        return self._error(f"{shown} must be {expected}, not {self._values[name]!r}")

    def choice(self, name: str, allowed: tuple[str, ...]) -> str | None:
        value = self._values.get(name)
        if value is None or value in allowed:
            return value
        raise self._wrong(name, f"one of {', '.join(allowed)}")

    def switch(self, name: str) -> bool | None:
        value = self._values.get(name)
        if isinstance(value, str):
            value = {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), value)
        if value is None or isinstance(value, bool):
            return value
        raise self._wrong(name, "true or false")

    def number(self, name: str, low: int, high: int) -> int | None:
        value = self._values.get(name)
        if value is None:
            return None
        if isinstance(value, str) and value.lstrip("-").isdigit():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(name, f"a whole number from {low} to {high}")
        return value

    def size(self, name: str) -> int | None:
        value = self.number(name, 8, 16384)
        if value is not None and value % 8:
            raise self._wrong(name, "a multiple of 8")
        return value

    def file(self, name: str) -> Path:
        path = Path(str(self._values[name])).expanduser()
        if not path.exists():
            raise self._wrong(name, "a file that exists")
        return path
