"""The README's second screen, word for word: a worker on one machine, the question on another.

Two network namespaces joined by a virtual cable where root and iproute2 are to be had, else two homes on this machine.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from cake_core.testing.toys import write_toy_checkpoint

pytest.importorskip("cake_transport_tcp", reason="machines meet over TCP")

README = Path(__file__).parents[2] / "README.md"


@dataclass(frozen=True)
class Machine:
    """Where to run a command: its prefix, its address as others see it, its home."""

    prefix: tuple[str, ...]
    address: str
    home: Path


Pair = tuple[Machine, Machine]


def screen(name: str, way: str = "two-machines") -> str:
    """The code block of the README that this comment announces."""
    match = re.search(rf"<!-- {way}: {re.escape(name)} -->\n```\w+\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert match is not None, f"the README has no block {name!r}"
    return match[1]


def _ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True, check=False, timeout=20).returncode == 0


def _namespaces(tag: str) -> bool:
    """Makes two namespaces with a cable between them; False where that is not allowed."""
    near, far = f"cake-a-{tag}", f"cake-b-{tag}"
    steps = [
        ("netns", "add", near),
        ("netns", "add", far),
        ("link", "add", f"cka{tag}", "netns", near, "type", "veth", "peer", "name", f"ckb{tag}", "netns", far),
        ("-n", near, "addr", "add", "10.213.7.1/24", "dev", f"cka{tag}"),
        ("-n", far, "addr", "add", "10.213.7.2/24", "dev", f"ckb{tag}"),
        *(("-n", space, "link", "set", device, "up") for space, device in ((near, f"cka{tag}"), (far, f"ckb{tag}"))),
        *(("-n", space, "link", "set", "lo", "up") for space in (near, far)),
    ]
    return all(_ip(*step) for step in steps)


@pytest.fixture(params=["namespaces", "homes"])
def machines(
    request: pytest.FixtureRequest, tmp_path: Path, free_address: Callable[[], str]
) -> Iterator[tuple[Machine, Machine]]:
    """The machine one types on, and the other one."""
    homes = [tmp_path / "here", tmp_path / "there"]
    for home in homes:
        home.mkdir()
    if request.param == "homes":
        yield Machine((), "", homes[0]), Machine((), free_address(), homes[1])
        return
    tag = str(os.getpid() % 100_000)
    try:
        if shutil.which("ip") is None or not _namespaces(tag):
            pytest.skip("network namespaces need root and iproute2")
        prefix = ("ip", "netns", "exec")
        yield (
            Machine((*prefix, f"cake-a-{tag}"), "", homes[0]),
            Machine((*prefix, f"cake-b-{tag}"), "10.213.7.2:10128", homes[1]),
        )
    finally:
        for space in ("a", "b"):
            if shutil.which("ip"):
                _ip("netns", "del", f"cake-{space}-{tag}")


Run = Callable[..., Any]


@pytest.fixture
def run(spawn: Callable[..., Any], home: dict[str, str]) -> Run:
    """`run(machine, line, model)` types a line on a machine."""

    def typed(machine: Machine, line: str, model: str = "") -> Any:
        folders = {"HOME": str(machine.home), "CAKE_CONFIG_DIR": "", "CAKE_CACHE_DIR": "", "CAKE_WORKERS": "auto"}
        command = [*machine.prefix, "bash", "-c", f"cd {machine.home} && {line} {model}"]
        return spawn(command, {**home, **folders})

    return typed


def test_the_second_screen(machines: Pair, run: Run) -> None:
    """Three commands, no file copied, no YAML: a token that two machines made."""
    here, there = machines
    model = _model(here.home)
    # In a namespace nothing but the README's words; on loopback, where there is no multicast, the worker's address as well.
    local = not there.prefix
    bind, found = (f"--address {there.address}", f"--workers {there.address}") if local else ("", "")

    worker = run(there, f"{screen('worker').strip()} {bind}")
    worker.wait_for("listening on")
    printed = re.search(r"cake key join [0-9a-f]{64}", worker.output)
    assert printed is not None, worker.output

    stranger = run(here, f"{screen('run').strip()} --max-tokens 2 {found}", model)
    assert stranger.wait() == 0, "who finds nobody to help answers alone"
    assert "cake key" in stranger.output, "who has no key is told what to do"

    assert screen("join").startswith("cake key join ")
    taken = run(here, f"{printed[0]} --replace")
    assert taken.wait() == 0, taken.output

    # The answer may be long; its end is not what is tested.
    answer = run(here, f"{screen('run').strip()} --max-tokens 24 {found}", model)
    assert answer.wait() == 0, answer.output
    assert re.search(r"found \S+ \(.*free", answer.output), answer.output
    assert re.search(r"master +model\.embed_tokens, model\.layers\.0-\d+ ", answer.output)
    assert re.search(r"\S+ +model\.layers\.\d+-29, model\.norm, lm_head ", answer.output)
    assert re.search(r"\d+ tokens, time to first token", answer.output)
    fetched = re.search(r"\(([\d.]+) MB fetched\)", worker.output)
    assert fetched is not None
    assert not list(there.home.rglob("topology.yml"))

    again = run(here, f"{screen('run').strip()} --max-tokens 2 {found}", model)
    assert again.wait() == 0, again.output
    assert worker.output.count("fetched)") == 1, "what is loaded already is not assigned again"


@pytest.mark.parametrize("machines", ["homes"], indirect=True)
def test_the_screen_with_a_topology(machines: Pair, run: Run) -> None:
    here, there = machines
    topology = screen("topology.yml", "topology").replace("192.168.1.20:10128", there.address)
    for machine in machines:
        (machine.home / "topology.yml").write_text(topology)
    worker = run(there, screen("worker", "topology").strip().replace("0.0.0.0:10128", there.address), _model(there.home))
    worker.wait_for("listening on")
    printed = re.search(r"cake key join [0-9a-f]{64}", worker.output)
    assert printed is not None, worker.output
    assert run(here, printed[0]).wait() == 0
    answer = run(here, screen("run", "topology").strip() + " --max-tokens 24", _model(here.home))
    assert answer.wait() == 0, answer.output
    assert re.search(r"laptop +model\.layers\.0-14 ", answer.output)
    assert re.search(r"\d+ tokens, time to first token", answer.output)


def _model(folder: Path) -> str:
    """Nothing where the default model is to be had: then the commands run as printed. Else a toy of the same layers."""
    from cake_core.models import packaged_default

    if find_spec("cake_llama") is not None and packaged_default() is not None:
        return ""
    write_toy_checkpoint(folder / "toy", layers=30)
    return f"--model {folder / 'toy'}"
