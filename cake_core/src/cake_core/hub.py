"""Downloads from the Hugging Face hub into its own cache: the one module of core that speaks HTTP, and only when called.

`huggingface_hub` knows tokens, mirrors, the cache's layout and small files. Large files are fetched here, because a
download that was interrupted must go on where it stopped, also in the next process: into `blobs/<hash>.incomplete`, checked
against the hub's SHA-256, then handed to the library as a blob that is there already.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cake_core.checkpoint import Checkpoint
from cake_core.errors import CheckpointError
from cake_core.filenames import is_file_name
from cake_core.models import PARTIAL_SUFFIX, SINGLE, HubId, cached, hub_cache, pick_gguf, snapshot

if TYPE_CHECKING:
    from cake_core.model import Progress

LARGE = 4 * 1024 * 1024
_CHUNK = 1024 * 1024
_TIMEOUT = 30.0
_SIDE_FILES = re.compile(
    r"^(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json$"
    r"|^(merges\.txt|tokenizer\.model|chat_template\.jinja)$"
)


def pull(hub_id: HubId, progress: Progress | None = None) -> Checkpoint:
    """Downloads what a model needs, and nothing else, and opens it. What is there already is not fetched again.

    Raises CheckpointError with the remedy: no such repository or file, gated, no token, offline, disk full, no weights that
    Cake reads.
    """
    try:
        import huggingface_hub
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError as error:
        raise CheckpointError(f"{hub_id} is not here, and downloading needs `pip install 'cake-core[hub]'`") from error
    disable_progress_bars()  # ours is one bar for all files
    try:
        info = huggingface_hub.HfApi().model_info(hub_id.repo, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        names = needed_files(hub_id, sizes)
        _check_space(hub_id, {name: sizes[name] for name in names})
        total, done = sum(sizes[name] for name in names), 0
        for name in names:
            if sizes[name] > LARGE:
                _fetch_blob(hub_id.repo, name, _shifted(progress, done, total))
            huggingface_hub.hf_hub_download(hub_id.repo, name, cache_dir=hub_cache())
            done += sizes[name]
            if progress is not None:
                progress(done, total)
    except Exception as error:
        raise explain(hub_id, error) from error
    checkpoint = cached(hub_id)
    if checkpoint is None:
        raise CheckpointError(f"{hub_id} was downloaded but cannot be opened; `cake rm {hub_id.repo}` and pull it again")
    return checkpoint


def _shifted(progress: Progress | None, done: int, total: int) -> Progress:
    def report(part: int, _: int) -> None:
        if progress is not None:
            progress(done + part, total)

    return report


def needed_files(hub_id: HubId, names: Iterable[str]) -> list[str]:
    """Files of a repository that the model needs, small ones first.

    Raises CheckpointError when it has no usable weights, or a file could not be put inside a folder under its name.
    """
    needed = _needed(hub_id, sorted(names))
    for name in needed:
        if not all(map(is_file_name, name.split("/"))):
            raise CheckpointError(f"{hub_id.repo} lists {name!a:.100}, which cannot be a file of a folder; do not trust it")
    return needed


def _needed(hub_id: HubId, names: list[str]) -> list[str]:
    if hub_id.file.endswith(SINGLE):
        if hub_id.file not in names:
            have = ", ".join(name for name in names if name.endswith(SINGLE) and "/" not in name) or "none"
            raise CheckpointError(f"{hub_id.repo} has no file {hub_id.file}; its safetensors files: {have}")
        return [*(name for name in names if _SIDE_FILES.match(name)), hub_id.file]
    if hub_id.file or hub_id.quantisation:
        return _gguf_files(hub_id, names)
    if "model_index.json" in names:
        return _diffusers_files(names)
    weights = [name for name in names if name.endswith(".safetensors") and "/" not in name and "consolidated" not in name]
    if weights:
        indexed = "model.safetensors.index.json" in names
        shards = [name for name in weights if re.match(r"model-\d+-of-\d+\.safetensors$", name)]
        chosen = shards if indexed and shards else [name for name in weights if name == "model.safetensors"] or weights
        index = ["model.safetensors.index.json"] if indexed and shards else []
        return [*(name for name in names if _SIDE_FILES.match(name)), *index, *chosen]
    if any(name.endswith(".gguf") for name in names):
        return _gguf_files(hub_id, names)
    old = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    hint = f"only {old[0]}, a format that can run code when opened; look for a safetensors version" if old else "no weights"
    raise CheckpointError(f"{hub_id.repo} has {hint}")


def _gguf_files(hub_id: HubId, names: list[str]) -> list[str]:
    found = hub_id.file if hub_id.file in names else "" if hub_id.file else pick_gguf(names, hub_id.quantisation)
    if not found:
        have = ", ".join(name for name in names if name.endswith(".gguf")) or "none"
        raise CheckpointError(f"{hub_id.repo} has no GGUF file for {hub_id}; its GGUF files: {have}")
    match = re.match(r"(.*)-\d{5}-of-(\d{5})\.gguf$", found)
    return (
        [found] if match is None else [n for n in names if re.match(rf"{re.escape(match[1])}-\d{{5}}-of-{match[2]}\.gguf$", n)]
    )


def _diffusers_files(names: list[str]) -> list[str]:
    """Everything of a diffusers folder but other formats, and each component's weights once: in fp16 where it has them."""
    chosen = ["model_index.json"]
    for folder in dict.fromkeys(name.rpartition("/")[0] for name in names if name.count("/") == 1):
        inside = [name for name in names if name.rpartition("/")[0] == folder]
        half = [name for name in inside if ".fp16" in name and (name.endswith(".safetensors") or ".index." in name)]
        full = [name for name in inside if re.search(r"/[^.]+\.safetensors(\.index\.json)?$", name)]
        side = [name for name in inside if name.endswith((".json", ".txt", ".model")) and ".index." not in name]
        chosen += [*side, *(half or full)]
    if not any(name.endswith(".safetensors") for name in chosen):
        raise CheckpointError("this diffusers repository has no safetensors weights; look for a version that has")
    return chosen


def _check_space(hub_id: HubId, sizes: Mapping[str, int]) -> None:
    folder, here = hub_id.folder, snapshot(hub_id)
    begun = sum(file.stat().st_size for file in folder.glob(f"blobs/*{PARTIAL_SUFFIX}"))
    missing = sum(size for name, size in sizes.items() if here is None or not (here / name).is_file()) - begun
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if missing > free:
        raise OSError(errno.ENOSPC, f"{missing / 1e9:.1f} GB to download, {free / 1e9:.1f} GB free")


def _fetch_blob(repo: str, name: str, progress: Progress) -> None:
    """Brings one large file into the cache as a blob, going on where an earlier attempt stopped."""
    from filelock import FileLock
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repo, name)
    metadata = get_hf_file_metadata(url)
    etag, size = metadata.etag, metadata.size
    if not etag or not size or not re.fullmatch(r"[0-9A-Za-z_.-]+", etag):
        return  # a server that says too little about the file: the library downloads it in its own way
    folder = HubId(repo).folder
    lock = hub_cache() / ".locks" / folder.name / f"{etag}.lock"  # where huggingface_hub has it, too
    for path in (lock.parent, folder / "blobs"):
        path.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        _fetch_locked(url, metadata.location, folder / "blobs" / etag, size, progress)


def _fetch_locked(url: str, location: str, blob: Path, size: int, progress: Progress) -> None:
    if blob.exists():
        return
    partial = blob.with_name(blob.name + PARTIAL_SUFFIX)
    _download(url, location, partial, size, progress)
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and _sha256(partial) != blob.name:
        partial.unlink()
        raise CheckpointError(f"{urlsplit(url).path} arrived damaged and was deleted; pull it again")
    os.replace(partial, blob)


def _download(url: str, location: str, partial: Path, size: int, progress: Progress) -> None:
    """Appends to `partial` until it has `size` bytes. The token goes to the hub's own host only, not to its storage."""
    import urllib.request

    from huggingface_hub import get_token

    token = get_token() if urlsplit(location).netloc == urlsplit(url).netloc else None
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with partial.open("ab") as stream:
        done = stream.tell()
        if done > size:
            stream.truncate(0)
            done = 0
        while done < size:
            request = urllib.request.Request(location, headers={**headers, "Range": f"bytes={done}-"})  # noqa: S310
            before = done
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:  # noqa: S310 - the hub's own address
                if response.status != 206:  # a server without ranges starts over
                    stream.truncate(0)
                    done = before = 0
                while done < size and (chunk := response.read(min(_CHUNK, size - done))):
                    stream.write(chunk)
                    done += len(chunk)
                    progress(done, size)
            if done == before:
                raise ConnectionError(f"the server ended {partial.name} at {done} of {size} bytes")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def explain(hub_id: HubId, error: Exception) -> CheckpointError:
    """The one message for whatever went wrong, with its remedy."""
    from huggingface_hub import errors, get_token

    if isinstance(error, CheckpointError):
        return error
    page = f"https://huggingface.co/{hub_id.repo}"
    token = "your token has no access" if get_token() else "no token is set (`export HF_TOKEN=…` or `hf auth login`)"
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(f"{hub_id.repo} is gated: accept its terms at {page}, then pull again ({token})")
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(f"the hub has no {hub_id.repo}, or it is private and {token}; check the spelling")
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None and error.response.status_code in (401, 403):
        return CheckpointError(
            f"the hub refuses {hub_id.repo}: {token}; a token is made at https://huggingface.co/settings/tokens"
        )
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return CheckpointError(f"{hub_id.repo} lacks a file that its listing names; pull again")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return CheckpointError(
            f"the disk of {hub_cache()} is full: {error.strerror}; free space with `cake rm`, or set HF_HOME to another disk"
        )
    if isinstance(error, PermissionError):
        return CheckpointError(f"cannot write to {error.filename or hub_cache()}; set HF_HOME to a folder of yours")
    if isinstance(error, errors.OfflineModeIsEnabled) or _offline():
        return CheckpointError(
            f"{hub_id} is not in {hub_cache()}, and HF_HUB_OFFLINE forbids downloading; unset it and pull again"
        )
    return CheckpointError(f"cannot download {hub_id}: {_first_line(error)}; check the network, `cake pull {hub_id}` goes on")


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
