"""From what a user writes after `--model` to a checkpoint on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from cake_core.checkpoint import ABSENT, Checkpoint, SafetensorsCheckpoint
from cake_core.errors import CheckpointError, UnsupportedModel
from cake_core.formats.diffusers import MODEL_INDEX, DiffusersCheckpoint
from cake_core.formats.gguf import GgufCheckpoint, part_number

TOYS = ("toy", "toy-image")


def resolve(reference: str) -> Checkpoint | None:
    """The checkpoint of a folder, a `.gguf` or `.safetensors` file, `toy`, or a hub id (downloaded if need be).

    An empty reference is the default model. None when the reference is none of these. Raises CheckpointError, with the
    remedy, for one that is but cannot be opened.
    """
    if not reference:
        from cake_core.models import default_model

        return default_model()
    if reference in TOYS:
        from cake_core.testing.toys import toy_checkpoint

        return toy_checkpoint(reference)
    path = Path(os.path.expandvars(reference)).expanduser()
    if os.path.exists(path):  # Path.exists raises an OSError for what is too long to be a path
        return open_path(path)
    from cake_core.models import HubId, cached

    hub_id = None if _looks_like_path(reference) else HubId.parse(reference)
    if hub_id is None:
        raise CheckpointError(
            f"there is no model at {path}; give a folder, a .gguf or .safetensors file, or a hub id like org/name"
        )
    if (checkpoint := cached(hub_id)) is not None:
        return checkpoint
    from cake_core.hub import pull

    return pull(hub_id)


def _looks_like_path(reference: str) -> bool:
    """`./x`, `/x`, `~/x`, `C:\\x` are meant as paths even where nothing is."""
    return reference.startswith((".", "/", "~", "\\")) or "\\" in reference or reference[1:2] == ":"


def open_path(path: Path, name: str = "") -> Checkpoint:
    """The checkpoint at an existing path. Raises CheckpointError, saying what is missing, when there is none."""
    path = path.absolute()
    if path.is_dir():
        return _open_folder(path, name)
    if path.suffix == ".gguf":
        return GgufCheckpoint(path, name)
    if path.suffix == ".safetensors":
        return SafetensorsCheckpoint(path, name)
    raise UnsupportedModel(
        f"{path} is no model that Cake reads: it takes folders with safetensors, .gguf and .safetensors files"
    )


def _open_folder(path: Path, name: str) -> Checkpoint:
    if (path / MODEL_INDEX).is_file():
        return DiffusersCheckpoint(path, name)
    if (path / "config.json").is_file():
        return SafetensorsCheckpoint(path, name)
    if models := gguf_models(path):
        if len(models) > 1:
            names = ", ".join(model.name for model in models[:5])
            raise CheckpointError(f"{path} holds several models ({names}); name the file you want")
        return GgufCheckpoint(models[0], name)
    if (path / "topology.yml").is_file() and (path / "model").is_dir():
        return _open_folder(path / "model", name or path.name)
    if (path / ABSENT).is_file():  # a bundle of a single file, which has no configuration beside it
        return SafetensorsCheckpoint(path, name)
    if any(path.glob("*.safetensors")):
        raise CheckpointError(f"{path} has weights but no config.json; copy it from the model's repository")
    found = "is empty" if not any(path.iterdir()) else "has no config.json, model_index.json or .gguf file"
    raise CheckpointError(f"{path} is not a model folder: it {found}; `cake pull org/name` downloads a model")


def gguf_models(folder: Path) -> list[Path]:
    """The GGUF models of a folder, several parts counted once, by their first; vision projectors are not models."""
    files = [file for file in sorted(folder.glob("*.gguf")) if not file.name.startswith("mmproj")]
    return [file for file in files if part_number(file) == 1]
