"""Cake in one minute: two workers and a master as processes of this machine answer a question, then paint an apple.

Needs cake-core, cake-llama and cake-transport-tcp; with cake-sd and cake-emoji it paints as well. Everything it makes is in
a temporary folder, and every process it starts is gone when it ends, also after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

CAKE = [sys.executable, "-m", "cake_core"]
START_SECONDS = 120
SAMPLING = ("--temperature", "0.2", "--top-p", "0.9", "--seed", "1")
"""What the authors of the small model recommend."""
ALONE: Any = {"start_new_session": True} if os.name == "posix" else {"creationflags": 0x200}
"""Ctrl-C reaches this process alone, which then ends the others in order."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Two workers and a master answer a question, then paint a picture.")
    parser.add_argument("--model", default="", help="text model (default: the small one that `cake run` uses)")
    parser.add_argument("--prompt", default="Why is the sky blue?")
    parser.add_argument("--max-tokens", default="160")
    parser.add_argument("--image-model", default="", help="image model (default: the embedded one, if installed)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="cake-demo-") as folder:
            os.environ.update(CAKE_CONFIG_DIR=folder, CAKE_CLUSTER_KEY=secrets.token_hex(32))
            answer(Path(folder), options.model, options.prompt, options.max_tokens)
            if options.image_model or all(importlib.util.find_spec(name) for name in ("cake_sd", "cake_emoji")):
                paint(Path(folder), options.image_model)
    except KeyboardInterrupt:
        print("\ninterrupted; every process is ended")
        return 130
    except subprocess.CalledProcessError as error:
        print(f"\n`cake {' '.join(error.cmd[len(CAKE) :][:1])}` failed with exit code {error.returncode}", file=sys.stderr)
        return 1
    print(f"\ndone in {time.monotonic() - start:.0f} s")
    return 0


def answer(folder: Path, model: str, prompt: str, max_tokens: str) -> None:
    """The layers in two halves on two workers, everything else on the master."""
    named = ["--model", model] if model else []
    plan = json.loads(subprocess.check_output([*CAKE, "topology", "plan", "--json", *named], stderr=subprocess.DEVNULL))
    blocks = [name for span in plan["spans"] for name in span["layers"] if name.startswith("model.layers.")]
    half = (len(blocks) + 1) // 2
    layers = {"left": f"model.layers.0-{half - 1}", "right": f"model.layers.{half}-{len(blocks) - 1}"}
    with workers(folder, layers, named) as topology:
        cake("run", *named, "--topology", str(topology), *SAMPLING, "--max-tokens", max_tokens, prompt)


def paint(folder: Path, model: str) -> None:
    """The unet on one worker, text encoder and autoencoder on the other."""
    named = ["--model-type", "image", *(["--model", model] if model else [])]
    picture = folder / "apple.png"
    with workers(folder, {"painter": "unet", "studio": "clip, vae"}, named) as topology:
        cake("run", *named, "--topology", str(topology), "--seed", "1", "-o", str(picture), "a red apple")


@contextlib.contextmanager
def workers(folder: Path, layers: Mapping[str, str], named: Sequence[str]) -> Iterator[Path]:
    """Starts a worker for each name, and ends them all, whatever happens."""
    addresses = dict(zip(layers, free_addresses(len(layers)), strict=True))
    topology = folder / "topology.yml"
    nodes = [f"{name}:\n  host: '{addresses[name]}'\n  layers: [{layers[name]}]\n" for name in layers]
    topology.write_text("".join(nodes))
    print(f"topology.yml\n\n{topology.read_text()}", flush=True)
    processes: list[Worker] = []
    try:
        for name, address in addresses.items():
            arguments = ["worker", *named, "--topology", str(topology), "--name", name, "--address", address]
            processes.append(start(name, arguments))
        wait_until_listening(processes)
        yield topology
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(10)
    except BaseException:
        # From here on nothing may stop the end: a terminal and a test runner send the signal twice.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise
    finally:
        for process in processes:
            process.kill()
            process.wait()


def start(name: str, arguments: Sequence[str]) -> Worker:
    """A process of Cake whose lines appear here under its name."""
    worker = Worker([*CAKE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **ALONE)
    threading.Thread(target=relay, args=(name, worker), daemon=True).start()
    return worker


class Worker(subprocess.Popen[str]):
    """A worker process; `listening` is set when it says so, and when it ends."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.listening = threading.Event()
        super().__init__(*arguments, **settings)


def relay(name: str, worker: Worker) -> None:
    for line in worker.stdout or ():
        print(f"[{name}] {line}", end="", flush=True)
        if line.startswith("listening on"):
            worker.listening.set()
    worker.listening.set()


def wait_until_listening(workers: Sequence[Worker]) -> None:
    """Raises CalledProcessError when one ends instead, or takes too long."""
    until = time.monotonic() + START_SECONDS
    for worker in workers:
        if not worker.listening.wait(max(0.0, until - time.monotonic())) or worker.poll() is not None:
            raise subprocess.CalledProcessError(worker.poll() or 1, worker.args)


def cake(*arguments: str) -> None:
    """Runs the master in the foreground. Raises CalledProcessError when it fails."""
    shown = [Path(text).name if os.path.isabs(text) else text for text in arguments]
    print(f"\n$ {shlex.join(['cake', *shown])}\n", flush=True)
    command = [*CAKE, *arguments]
    process = subprocess.Popen(command, **ALONE)
    try:
        code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if code:
        raise subprocess.CalledProcessError(code, command)


def free_addresses(count: int) -> list[str]:
    """Loopback addresses whose ports are free now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
