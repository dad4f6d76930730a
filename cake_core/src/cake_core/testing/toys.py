"""The toy models: whole backends in plain Python, small enough to read, exact enough to prove things with.

They are what `cake run --model toy` uses, what the engine, worker and server are tested with, and an example for whoever
writes a backend. See `toy_text` and `toy_image` for what they compute and which options they take.
"""

from cake_core.testing.toy_checkpoint import (
    toy_checkpoint,
    toy_image_checkpoint,
    write_toy_checkpoint,
    write_toy_image_checkpoint,
)
from cake_core.testing.toy_image import ToyImageBackend
from cake_core.testing.toy_text import ToyTextBackend
from cake_core.testing.toy_tokenizer import ToyTokenizer

__all__ = [
    "ToyImageBackend",
    "ToyTextBackend",
    "ToyTokenizer",
    "toy_checkpoint",
    "toy_image_checkpoint",
    "write_toy_checkpoint",
    "write_toy_image_checkpoint",
]
