"""diffusers and transformers talk on the terminal; what a user should know comes as events and errors here."""

from __future__ import annotations

import functools
import warnings
from typing import Any


@functools.cache
def quieten() -> None:
    """No progress bars and no remarks of theirs below an error."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


@functools.cache
def auto_pipeline() -> Any:
    """diffusers' table of which pipeline does which task. Importing it imports pipelines that warn of their own past."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.pipelines import auto_pipeline as module
    return module
