"""Single-file checkpoints to diffusers folders: `python -m cake_sd.convert model.safetensors FOLDER --config SOURCE`.

A single file holds all components under the names of the original trainers; the names are diffusers' own to translate. It
has neither configurations nor tokenizers: `SOURCE` is a diffusers folder (weights are not needed) or a hub id with those of
the version the file was trained from.
"""

from __future__ import annotations

from pathlib import Path

import click

from cake_core.errors import CakeError, CheckpointError, ConfigError
from cake_core.formats.diffusers import MODEL_INDEX, DiffusersCheckpoint
from cake_core.formats.safetensors import read_header

MARKS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")
"""How tensors of a single-file checkpoint begin."""


def is_single_file(path: Path) -> bool:
    """Whether a `.safetensors` file holds a whole pipeline. Raises CheckpointError for a damaged one."""
    return path.suffix == ".safetensors" and any(name.startswith(MARKS) for name in read_header(path))


def convert(file: Path, target: Path, source: str) -> None:
    """Raises ConfigError for a target that is there or a source that is none, CheckpointError for a file that is not one."""
    import diffusers

    from cake_sd.quiet import quieten

    quieten()
    if target.exists():
        raise ConfigError(f"{target} is there already; delete it or choose another folder")
    if not is_single_file(file):
        raise CheckpointError(f"{file} is no single-file checkpoint: none of its tensors begins with {MARKS[0]}")
    if not (Path(source) / MODEL_INDEX).is_file():
        raise ConfigError(f"{source} has no {MODEL_INDEX}; give a diffusers folder of the version the file was trained from")
    name = str(DiffusersCheckpoint(Path(source)).config.get("_class_name", ""))
    pipeline = getattr(diffusers, name, None)
    if pipeline is None or not hasattr(pipeline, "from_single_file"):
        raise ConfigError(f"{source}: {name or 'its pipeline'} cannot be read from a single file")
    try:
        loaded = pipeline.from_single_file(str(file), config=source, local_files_only=True, safety_checker=None)
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file} does not fit {source}: {reason}") from error
    loaded.save_pretrained(str(target))


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--config", "source", required=True, metavar="FOLDER", help="Diffusers folder of the version it was trained from."
)
def main(file: Path, folder: Path, source: str) -> None:
    """Convert a single-file checkpoint to a diffusers folder."""
    try:
        convert(file, folder, source)
    except CakeError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"wrote {folder}")


if __name__ == "__main__":
    main()
