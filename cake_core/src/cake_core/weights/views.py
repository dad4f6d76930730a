"""Files of the cache laid out as models, and what the cache holds.

::

    weights/models/VIEW/          a checkpoint: links to whole files under the paths of a manifest
    weights/models/VIEW.json      which files it needs, and when it was last used (its time of change)

Paths of a manifest are checked when it is read, and used only inside a folder made afresh.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cake_core.weights.journal import Journal
from cake_core.weights.manifest import DIGEST, PIECE, FileSpec, is_name, view_name
from cake_core.weights.store import PART, PIECES, Store, is_regular


@dataclass(frozen=True, slots=True)
class View:
    """A model in the cache, or as much of it as has come: `nbytes` of `total` are here."""

    name: str
    model: str
    layers: str
    path: Path
    files: tuple[str, ...]
    total: int
    nbytes: int
    used: float


class Views:
    """The models in a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._folder = store.folder / "models"

    def announce(self, files: Sequence[FileSpec], model: str, layers: str) -> None:
        """Says what the files are for, so that nobody prunes them while they come, and when they were last used."""
        self._folder.mkdir(parents=True, exist_ok=True)
        name = view_name(files)
        said = {"model": model, "layers": layers, "files": {file.name: file.nbytes for file in files}}
        draft = self._folder / f".{name}.{secrets.token_hex(4)}"
        draft.write_text(json.dumps(said), "utf-8")
        draft.replace(self._folder / f"{name}.json")

    def lay_out(self, files: Sequence[FileSpec]) -> Path:
        """The folder in which these files, all of them here, are a model."""
        return self._lay_out(files, _link)

    def lay_out_arriving(self, files: Sequence[FileSpec]) -> Path | None:
        """The same while they are being filled, by links, which stay right when a file is whole. None where that cannot be."""
        if os.name == "nt":
            return None  # a file that somebody reads cannot be given its name there
        try:
            return self._lay_out(files, os.link)
        except OSError:
            return None

    def _lay_out(self, files: Sequence[FileSpec], link: Callable[[Path, Path], None]) -> Path:
        view = self._folder / view_name(files)
        if view.is_dir() and not view.is_symlink() and all(self._is_laid(view, file) for file in files):
            return view
        self._folder.mkdir(parents=True, exist_ok=True)
        draft = self._folder / f".{view.name}.{secrets.token_hex(4)}"
        try:
            for file in files:
                target = draft / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    link(self.store.find(file.name), target)
                except FileNotFoundError:  # it has become whole just now
                    link(self.store.find(file.name), target)
            _remove(view)
            draft.rename(view)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return view

    def _is_laid(self, view: Path, file: FileSpec) -> bool:
        try:
            there, here = (view / file.path).stat(), self.store.find(file.name).stat()
        except OSError:
            return False
        return (there.st_size, there.st_mtime_ns) == (here.st_size, here.st_mtime_ns)

    def list(self) -> list[View]:
        """What is in the cache, used last first."""
        found = [self._view(path) for path in self._folder.glob("[!.]*.json")] if self._folder.is_dir() else []
        return sorted((view for view in found if view is not None), key=lambda view: -view.used)

    def _view(self, path: Path) -> View | None:
        try:
            said = json.loads(path.read_bytes())
            sizes = {name: int(nbytes) for name, nbytes in said["files"].items() if is_name(name)}
            here = sum(self._bytes_here(name) for name in sizes)
            folder = path.with_suffix("")
            return View(
                path.stem,
                str(said["model"]),
                str(said["layers"]),
                folder,
                tuple(sizes),
                sum(sizes.values()),
                here,
                path.stat().st_mtime,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # another process removes it just now, or it is not ours

    def _bytes_here(self, name: str) -> int:
        path = self.store.path(name)
        if is_regular(path):
            return path.stat().st_size
        with contextlib.suppress(OSError):
            row = path.with_name(name + PIECES).read_bytes()
            return min(
                PIECE * sum(any(row[i : i + DIGEST]) for i in range(0, len(row), DIGEST)),
                path.with_name(name + PART).stat().st_size,
            )
        return 0

    def nbytes(self) -> int:
        """Bytes of all files, those that no model names included."""
        return sum(path.stat().st_size for path in self._data_files())

    def _data_files(self) -> Iterator[Path]:
        if self.store.files.is_dir():
            yield from (path for path in self.store.files.iterdir() if path.suffix != PIECES and is_regular(path))

    def prune(self, max_size: int, keep: Sequence[str] = ()) -> int:
        """Removes models, the one used longest ago first, until at most `max_size` bytes are left; returns the bytes freed.

        `keep` names views that stay. Files that a process is filling stay too.
        """
        before = self.nbytes()
        views = self.list()
        while True:
            self._drop_unnamed({name for view in views for name in view.files})
            victims = [view for view in views if view.name not in keep]
            if self.nbytes() <= max_size or not victims:
                return before - self.nbytes()
            victim = victims[-1]
            _remove(victim.path)
            victim.path.with_suffix(".json").unlink(missing_ok=True)
            views.remove(victim)

    def _drop_unnamed(self, named: set[str]) -> None:
        for path in list(self._data_files()):
            name = path.name.removesuffix(PART)
            if name in named:
                continue
            with contextlib.suppress(_Busy, OSError):
                journal = Journal(self.store.files / (name + PIECES), 0, _give_up)
                try:
                    path.unlink(missing_ok=True)
                    (self.store.files / (name + PIECES)).unlink(missing_ok=True)
                finally:
                    journal.close()


class _Busy(Exception):
    """Another process fills the file."""


def _give_up() -> None:
    raise _Busy


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or, where the file system has none, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
