"""Random GGUF blocks of every type that is multiplied as it is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCKS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
"""Where the f16 of a block are: random bits there would be infinities."""


LEVELS = {"Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31, "Q8_0": 128, "Q4_K": 945, "Q5_K": 1953, "Q6_K": 4096}
"""The largest number that a block's f16 scale is multiplied with."""


def random_blocks(kind: str, rows: int, cols: int, rng: np.random.Generator, size: float = 1.0) -> NDArray[np.uint8]:
    """Every bit pattern of the codes; weights of up to about `size`."""
    values, nbytes = BLOCKS[kind]
    blocks = rng.integers(0, 256, (rows, cols // values, nbytes), dtype=np.uint8)
    for at in HALVES[kind]:
        scale = rng.uniform(-size, size, (rows, cols // values, 1))
        scale = (scale / LEVELS[kind]).astype(np.float16)
        blocks[:, :, at : at + 2] = scale.view(np.uint8)
    return blocks.reshape(rows, -1)
