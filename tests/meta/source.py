"""The project's own source, read with `ast`: which module imports what, and how long things are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = sorted(path.parent for path in (*ROOT.glob("cake_*/pyproject.toml"), *ROOT.glob("plugins/*/pyproject.toml")))


@dataclass(frozen=True)
class Module:
    """One source file; `name` is dotted."""

    name: str
    file: Path

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.file.read_text("utf-8"))

    def imports(self) -> Iterator[tuple[str, bool]]:
        """(dotted name, whether at the top level) of every import that runs; those for type checkers do not."""
        yield from self._imports(self.tree, True)

    def _imports(self, node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield from ((f"{child.module}.{alias.name}", top) for alias in child.names)
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            else:
                yield from self._imports(child, top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def modules(folder: Path) -> list[Module]:
    """Modules of a distribution."""
    source = folder / "src"
    found = []
    for file in sorted(source.rglob("*.py")):
        parts = file.relative_to(source).with_suffix("").parts
        found.append(Module(".".join(parts).removesuffix(".__init__"), file))
    return found


EVERY_MODULE = [module for folder in DISTRIBUTIONS for module in modules(folder)]
