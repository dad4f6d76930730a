"""`cake worker` and `cake run` as processes on loopback: any order, any placement, and what goes wrong on the way."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cake_core.testing.toys import write_toy_checkpoint

pytest.importorskip("cake_transport_tcp", reason="processes meet over TCP")

PATIENCE = 120.0
Spawn = Callable[..., Any]
Pick = Callable[[], str]
RUN = ["cake", "run", "--model", "toy", "--seed", "5", "--max-tokens", "40"]


def write_topology(folder: Path, **nodes: tuple[str, str]) -> str:
    """topology.yml with a node for each name: (address, layers)."""
    entries = [f"{name}:\n  host: '{address}'\n  layers: [{layers}]\n" for name, (address, layers) in nodes.items()]
    (folder / "topology.yml").write_text("".join(entries))
    return "topology.yml"


def start_worker(spawn: Spawn, name: str, address: str, *more: str, model: str = "toy") -> Any:
    arguments = ["--model", model, "--topology", "topology.yml", "--name", name, "--address", address, *more]
    return spawn(["cake", "worker", *arguments])


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def answer(process: Any) -> str:
    """What a run printed to stdout; its stderr goes elsewhere."""
    assert process.wait() == 0, process.output
    return str(process.output)


def quiet(command: list[str]) -> str:
    """The command for a shell, with stderr left out."""
    return " ".join(f"'{word}'" for word in command) + " 2>errors.txt"


@pytest.mark.parametrize(
    "layers",
    [("model.layers.0-3",), ("model.embed_tokens, model.layers.0", "model.layers.1-3, model.norm, lm_head"), ("lm_head",)],
)
def test_any_placement_gives_the_same_text(spawn: Spawn, free_address: Pick, tmp_path: Path, layers: tuple[str, ...]) -> None:
    nodes = {f"w{i}": (free_address(), names) for i, names in enumerate(layers)}
    topology = write_topology(tmp_path, **nodes)
    alone = spawn(quiet([*RUN, "hello"]))
    # The master comes first, the workers after: any order will do.
    split = spawn(quiet([*RUN, "--topology", topology, "--wait", "40", "--route", "chain", "hello"]))
    workers = [start_worker(spawn, name, address) for name, (address, _) in nodes.items()]
    assert answer(split) == answer(alone)
    for worker in workers:
        worker.popen.send_signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert "draining" in worker.output


def test_workers_over_quic_and_tcp_in_one_topology(spawn: Spawn, free_address: Pick, tmp_path: Path) -> None:
    pytest.importorskip("qh3")
    nodes = {
        "left": (f"quic://{free_address()}", "model.layers.0-1"),
        "right": (free_address(), "model.layers.2-3, model.norm, lm_head"),
    }
    topology = write_topology(tmp_path, **nodes)
    for name, (address, _) in nodes.items():
        start_worker(spawn, name, address).wait_for("listening on")
    split = spawn(quiet([*RUN, "--topology", topology, "hello"]))
    assert answer(split) == answer(spawn(quiet([*RUN, "hello"])))


def test_a_worker_says_what_it_loaded(spawn: Spawn, free_address: Pick, tmp_path: Path) -> None:
    address = free_address()
    write_topology(tmp_path, left=(address, "model.layers.0-1"))
    worker = spawn(["cake", "worker", "--model", "toy", "--topology", "topology.yml", "--address", address])
    assert worker.wait_for("listening on") == f"listening on tcp://{address}"
    assert re.search(r"model\.layers\.0-1: \d+ B on cpu as f32", worker.output)
    assert "worker 'left' loaded" in worker.output
    worker.popen.send_signal(signal.SIGINT)
    assert worker.wait() == 130
    assert "Traceback" not in worker.output


def test_a_worker_that_dials_the_master(spawn: Spawn, free_address: Pick, tmp_path: Path) -> None:
    (tmp_path / "topology.yml").write_text("phone:\n  layers: [model.layers.2-3]\n")
    meeting = free_address()
    worker = spawn(["cake", "worker", "--model", "toy", "--topology", "topology.yml", "--join", meeting])
    worker.wait_for("cannot join yet")
    command = [*RUN, "--topology", "topology.yml", "--listen", meeting, "--wait", "40", "hello"]
    alone, first = spawn(quiet([*RUN, "hello"])), spawn(quiet(command))
    expected = answer(alone)
    assert answer(first) == expected
    worker.wait_for("joined")
    # It comes back to the next master at the same address by itself.
    assert answer(spawn(quiet(command))) == expected


def test_a_worker_that_is_not_there_is_named(spawn: Spawn, free_address: Pick, tmp_path: Path) -> None:
    address = free_address()
    topology = write_topology(tmp_path, garage=(address, "model.layers.0-1"))
    run = spawn([*RUN, "--topology", topology, "--wait", "0", "hello"])
    assert run.wait() == 1
    line = run.wait_for("error: ")
    assert "garage" in line
    assert address in line
    assert "Traceback" not in run.output


def test_a_worker_with_another_model(spawn: Spawn, free_address: Pick, tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path / "base", seed=1)
    write_toy_checkpoint(tmp_path / "tuned", seed=2)
    address = free_address()
    topology = write_topology(tmp_path, left=(address, "model.layers.0-1"))
    start_worker(spawn, "left", address, model="tuned").wait_for("listening on")
    run = spawn(["cake", "run", "--model", "base", "--topology", topology, "hello"])
    assert run.wait() == 2
    assert "holds other weights" in run.wait_for("error: ")


def test_a_worker_with_other_layers(spawn: Spawn, free_address: Pick, tmp_path: Path) -> None:
    address = free_address()
    write_topology(tmp_path, left=(address, "model.layers.0-1"))
    start_worker(spawn, "left", address).wait_for("listening on")
    topology = write_topology(tmp_path, left=(address, "model.layers.1-2"))
    run = spawn([*RUN, "--topology", topology, "hello"])
    assert run.wait() == 2
    assert "model.layers" in run.wait_for("error: ")


def test_a_port_that_is_taken(spawn: Spawn, free_address: Pick, tmp_path: Path) -> None:
    address = free_address()
    write_topology(tmp_path, left=(address, "model.layers.0-1"))
    start_worker(spawn, "left", address).wait_for("listening on")
    second = start_worker(spawn, "left", address)
    assert second.wait() == 2
    assert "another process has port" in second.wait_for("error: ")


@pytest.fixture
def slow(tmp_path: Path) -> str:
    """A model that takes its time, so that there is a middle of an answer."""
    write_toy_checkpoint(tmp_path / "slow", seconds_per_batch=0.1)
    return "slow"


def test_a_worker_lost_in_mid_answer_is_named(spawn: Spawn, free_address: Pick, tmp_path: Path, slow: str) -> None:
    address = free_address()
    topology = write_topology(tmp_path, left=(address, "model.layers.0-1"))
    worker = start_worker(spawn, "left", address, model=slow)
    worker.wait_for("listening on")
    options = ["--seed", "5", "--topology", topology, "--rejoin-timeout", "0.5"]
    run = spawn(["cake", "run", "--model", slow, *options, "hello"])
    run.wait_for("prompt tokens")
    worker.popen.kill()
    assert run.wait() == 1
    assert "left" in run.wait_for("error: ")
    assert "Traceback" not in run.output


def test_ctrl_c_ends_a_run(spawn: Spawn, slow: str) -> None:
    run = spawn(["cake", "run", "--model", slow, "--seed", "5", "hello"])
    run.wait_for("prompt tokens")
    run.popen.send_signal(signal.SIGINT)
    assert run.wait() == 130
    assert "interrupted" in run.output
    assert "Traceback" not in run.output


def test_a_model_that_does_not_fit_is_refused_with_the_numbers(spawn: Spawn, tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path / "large", memory=2000)
    run = spawn(["cake", "run", "--model", "large", "hello"])
    assert run.wait() == 1
    assert re.search(r"\d", run.wait_for("error: "))
    assert "Traceback" not in run.output


def test_a_reader_that_leaves_is_no_error(spawn: Spawn) -> None:
    run = spawn("cake run --model toy --max-tokens 200 hello 2>errors.txt | head -c 1; cat errors.txt")
    assert run.wait() == 0
    assert "Traceback" not in run.output
    assert "Exception" not in run.output


def test_workers_killed_and_started_again_in_mid_answer_change_nothing(
    spawn: Spawn, free_address: Pick, tmp_path: Path
) -> None:
    slow = "slower"
    write_toy_checkpoint(tmp_path / slow, seconds_per_batch=0.04)
    nodes = {"left": (free_address(), "model.layers.0-1"), "right": (free_address(), "model.layers.2-3")}
    topology = write_topology(tmp_path, **nodes)
    workers = {name: start_worker(spawn, name, address, model=slow) for name, (address, _) in nodes.items()}
    for worker in workers.values():
        worker.wait_for("listening on")
    command = ["cake", "run", "--model", slow, "--seed", "5", "--max-tokens", "24"]
    alone = spawn(quiet([*command, "hello"]))
    more = ["--topology", topology, "--route", "chain", "--wait", "40", "--rejoin-timeout", "60"]
    run, text = spawn(" ".join([*command, *more, "hello"]) + " >text.txt 2>log.txt"), tmp_path / "text.txt"
    for name, (address, _) in nodes.items():
        said = text.stat().st_size if text.exists() else 0
        wait_until(lambda said=said: text.exists() and text.stat().st_size > said)  # it is in the middle of it
        workers[name].popen.kill()
        workers[name] = start_worker(spawn, name, address, model=slow)
    assert run.wait() == 0, (tmp_path / "log.txt").read_text()
    assert text.read_text() == answer(alone)
