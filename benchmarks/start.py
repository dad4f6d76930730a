"""From `cake worker` to the first token that it gave, imports aside, against reading the same bytes from the page cache.

    python benchmarks/start.py [--layers 8] [--rounds 5]

A model with random weights in bf16 (122 MB a layer, 262 MB beside them), all of it on a worker with two threads, a key and
TLS; the master is this process, which has imported everything already. The worker is the command line's own: it imports first
what it will need, says when it has, and goes on from there. What it does after that (reading the topology, loading the
weights, opening its port) and what the master does (dialling, comparing, a prompt of one token) is the time that counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cold_join import free_port, write_model

from cake_core.events import TokenEvent
from cake_core.links.connect import Connector, Keyring
from cake_core.plugins import Plugins
from cake_core.requests import SamplingParams, TextRequest
from cake_core.runtime import RunSpec, open_text
from cake_core.topology import load_topology
from cake_core.warming import Warming

PLUGINS = Plugins()
REQUEST = TextRequest((100,), SamplingParams(temperature=0.0), 1, ignore_eos=True)


def import_all() -> None:
    """What a worker with this model imports sooner or later."""
    import cryptography.hazmat.primitives.asymmetric.ec
    import cryptography.x509  # noqa: F401

    import cake_core.worker.worker  # noqa: F401

    Warming(backend for backend in PLUGINS.backends.values() if backend.name == "llama").wait()
    PLUGINS.transport("tcp")


def serve(arguments: list[str]) -> None:
    """The worker: imports, says at what time it has done so, and is the command line from then on."""
    from cake_core.cli.main import main

    import_all()
    print(json.dumps(time.monotonic()), flush=True)
    sys.argv = ["cake", "worker", *arguments]
    main()


def start(work: Path, layers: int) -> tuple[float, float, float]:
    """Seconds: the worker's imports, from them until it listens, and until its first token is here."""
    port = free_port()
    held = f"[model.embed_tokens, model.layers.0-{layers - 1}, model.norm, lm_head]"
    (work / "topology.yml").write_text(f"far:\n  host: 127.0.0.1:{port}\n  layers: {held}\n")
    given = ["--model", "model", "--topology", "topology.yml", "--name", "far", "--address", f"127.0.0.1:{port}"]
    env = {**os.environ, "CAKE_CONFIG_DIR": str(work), "CAKE_CACHE_DIR": str(work), "PYTHONUNBUFFERED": "1"}
    keyring = Keyring(None, work, False, lambda key: None)  # noqa: ARG005
    keyring.key()
    dial = Connector(PLUGINS, keyring).dial
    spec = RunSpec(PLUGINS.resolve(str(work / "model")), load_topology(work / "topology.yml"), dial=dial, wait=60.0)
    began = time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", *given]
    with subprocess.Popen(command, env=env, cwd=work, stdout=subprocess.PIPE, text=True) as worker:
        try:
            assert worker.stdout is not None
            imported = float(worker.stdout.readline())
            if not any("listening on" in line for line in worker.stdout):
                sys.exit("the worker ended before it listened")
            listening = time.monotonic()
            runtime = open_text(PLUGINS, spec)
            next(event for event in runtime.engine.generate(REQUEST) if isinstance(event, TokenEvent))
            answered = time.monotonic()
            runtime.close()
        finally:
            worker.terminate()
    return imported - began, listening - imported, answered - imported


def read(files: list[str]) -> None:
    """The floor, in a process like the worker's: all bytes into memory of their own, by one thread."""
    import_all()
    kept = []
    began = time.monotonic()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            kept.append(file.read())
    print(json.dumps(time.monotonic() - began))


def read_files(files: list[Path]) -> float:
    command = [sys.executable, str(Path(__file__).resolve()), "--read", *map(str, files)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        write_model(work / "model", given.layers)
        files = sorted((work / "model").glob("*.safetensors"))
        total = sum(path.stat().st_size for path in files)
        start(work, given.layers)
        rounds = [(read_files(files), *start(work, given.layers)) for _ in range(given.rounds)]
    floor, imports, listening, answered = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(answered / floor for floor, *_, answered in rounds)
    print(f"{total / 1e6:.0f} MB, {given.rounds} rounds, medians")
    print(f"read from the page cache    {floor:6.3f} s")
    print(f"imports of the worker       {imports:6.3f} s")
    print(f"from there until it listens {listening:6.3f} s, until the first token {answered:.3f} s: {ratio:.2f} x")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--serve", *arguments]:
            serve(arguments)
        case ["--read", *files]:
            read(files)
        case _:
            main()
