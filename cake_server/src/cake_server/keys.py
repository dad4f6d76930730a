"""API keys from the command line, the environment and a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cake_core.errors import ConfigError

VARIABLE = "CAKE_API_KEY"


def collect_keys(given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """All keys, without doubles. Raises ConfigError for an empty one, and for a file without any."""
    keys = [*given, *filter(None, (key.strip() for key in os.environ.get(VARIABLE, "").split(",")))]
    if file is not None:
        keys += _read(file)
    if any(not key.strip() for key in keys):
        raise ConfigError("an API key must not be empty; give --api-key a value or leave it out")
    return tuple(dict.fromkeys(keys))


def _read(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the keys in {file}: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{file} holds no API key; write one a line")
    return keys
