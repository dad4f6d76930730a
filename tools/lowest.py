"""Writes a constraints file that pins each dependency to the lowest version a distribution declares.

python tools/lowest.py OUTPUT FOLDER...
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

_LOWER = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*>=\s*([0-9][0-9a-z.]*)")


def lowest(folder: Path) -> Iterator[str]:
    """`name==version` for every dependency with a lower bound, extras included."""
    project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project.get("optional-dependencies", {})
    for requirement in (*project.get("dependencies", []), *(item for items in extras.values() for item in items)):
        if match := _LOWER.match(requirement):
            yield f"{match[1]}=={match[2]}"


def main(output: str, *folders: str) -> None:
    pins = sorted({pin for folder in folders for pin in lowest(Path(folder))})
    names = [pin.partition("==")[0] for pin in pins]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SystemExit(f"different lower bounds for {', '.join(sorted(twice))}; make them equal")
    Path(output).write_text("\n".join(pins) + "\n", "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
