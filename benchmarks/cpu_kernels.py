"""Products of one matrix and few rows with cake-kernels: GB/s of weights read, beside PyTorch on the same shape.

`python benchmarks/cpu_kernels.py [--threads 2] [--rows 8192] [--cols 2048] [--types Q8_0,Q4_K,BF16] [--isa avx2]`

Eight matrices take turns, so that weights come from memory as they do in a model, not from the cache. The median of
`--repeats` products; `--cpu-time` takes processor time instead of the clock's, which a busy machine disturbs less (with one
thread only).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch

import cake_kernels

BLOCKS = {
    "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24),
    "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip
"""Columns and bytes of a block."""
PLAIN = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
COPIES = 8
BATCHES = (1, 4, 16, 256)


def matrices(
    kind: str, rows: int, cols: int, pool: cake_kernels.Pool
) -> tuple[list[cake_kernels.Matrix], list[torch.Tensor], int]:
    """COPIES matrices, the memory they live in, and the bytes of one in a file."""
    number = cake_kernels.TYPES[kind]
    if kind in PLAIN:
        plain = [torch.randn(rows, cols).to(PLAIN[kind]) for _ in range(COPIES)]
        return [cake_kernels.Matrix(m.data_ptr(), number, rows, cols, 0) for m in plain], plain, plain[0].nbytes
    values, nbytes = BLOCKS[kind]
    blocks = torch.zeros(rows * cols // values * nbytes, dtype=torch.uint8)
    size = cake_kernels.packed_bytes(kind, rows, cols)
    memory = [torch.empty(size + cake_kernels.ALIGNMENT, dtype=torch.uint8) for _ in range(COPIES)]
    found = []
    for one in memory:
        cake_kernels.use_large_pages(one.data_ptr(), one.nbytes)
        at = one.data_ptr() + -one.data_ptr() % cake_kernels.ALIGNMENT
        found.append(cake_kernels.Matrix(at, number, rows, cols, 0))
        pool.pack(found[-1], blocks.data_ptr())
    return found, memory, blocks.nbytes


def median(work: Sequence[Callable[[], object]], repeats: int, clock: Callable[[], float]) -> float:
    times = []
    for index in range(repeats):
        began = clock()
        work[index % len(work)]()
        times.append(clock() - began)
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--cols", type=int, default=2048)
    parser.add_argument("--types", default=",".join([*BLOCKS, *PLAIN]))
    parser.add_argument("--isa", default="")
    parser.add_argument("--repeats", type=int, default=24)
    parser.add_argument("--cpu-time", action="store_true")
    given = parser.parse_args()
    cake_kernels.use_isa(given.isa)
    torch.set_num_threads(given.threads)
    clock = time.thread_time if given.cpu_time else time.perf_counter
    pool = cake_kernels.Pool(given.threads)
    print(f"{cake_kernels.isa()}, {given.threads} threads, {given.rows} x {given.cols}; GB/s of weights, GFLOP/s")
    for kind in given.types.split(","):
        found, memory, nbytes = matrices(kind, given.rows, given.cols, pool)
        line = [f"{kind:5}"]
        for m in BATCHES:
            x, y = torch.randn(m, given.cols), torch.empty(m, given.rows)
            ours = [lambda w=w, x=x, y=y, m=m: pool.matmul(w, None, x.data_ptr(), y.data_ptr(), m) for w in found]  # type: ignore[misc]
            seconds = median(ours, given.repeats, clock)
            flops = 2 * m * given.rows * given.cols
            line.append(f"m={m}: {nbytes / seconds / 1e9:5.1f} GB/s {flops / seconds / 1e9:5.0f}")
            if kind in PLAIN:
                typed = x.to(PLAIN[kind])
                theirs = [lambda w=w, x=typed: torch.nn.functional.linear(x, w) for w in memory]  # type: ignore[misc]
                seconds = median(theirs, given.repeats, clock)
                line.append(f"(torch {nbytes / seconds / 1e9:5.1f} GB/s {flops / seconds / 1e9:5.0f})")
        print("  ".join(line), flush=True)
    pool.close()


if __name__ == "__main__":
    main()
