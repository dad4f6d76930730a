"""Where this process keeps its things, and what it was told on the command line."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Options:
    """Process-wide settings, handed to `cake_configure`."""

    config_dir: Path
    cache_dir: Path
    verbosity: int = 0


def load_options(verbosity: int = 0) -> Options:
    """`CAKE_CONFIG_DIR`, `CAKE_CACHE_DIR`, else the user's folders by the platform's habit. Creates nothing."""
    return Options(_folder("CAKE_CONFIG_DIR", "config"), _folder("CAKE_CACHE_DIR", "cache"), verbosity)


def _folder(variable: str, kind: str) -> Path:
    if chosen := os.environ.get(variable):
        return Path(chosen)
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("APPDATA" if kind == "config" else "LOCALAPPDATA") or home / "AppData" / "Local")
        return base / "cake" if kind == "config" else base / "cake" / "cache"
    if sys.platform == "darwin":
        return home / "Library" / ("Application Support" if kind == "config" else "Caches") / "cake"
    return Path(os.environ.get(f"XDG_{kind.upper()}_HOME") or home / f".{kind}") / "cake"
