"""The name `emoji` for the model in this package."""

from __future__ import annotations

from pathlib import Path

from cake_core.formats.diffusers import DiffusersCheckpoint

NAME = "emoji"
FOLDER = Path(__file__).parent / "model"


def resolve(reference: str) -> DiffusersCheckpoint | None:
    """The embedded model for its name; None for anything else, also for nothing: that is the text default's."""
    return DiffusersCheckpoint(FOLDER, NAME) if reference == NAME else None
