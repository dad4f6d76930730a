"""What is posted to the engine's inbox."""

from __future__ import annotations

from dataclasses import dataclass

from cake_core.engine.sequence import Sequence
from cake_core.engine.step import Step
from cake_core.errors import CakeError
from cake_core.model import Batch


@dataclass(frozen=True, slots=True)
class Submit:
    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Cancel:
    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Completed:
    step: Step
    batch: Batch | None
    error: CakeError | None


@dataclass(frozen=True, slots=True)
class Wake:
    """The cluster changed, or the engine closes."""


Post = Submit | Cancel | Completed | Wake
