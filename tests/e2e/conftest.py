"""Real processes of the command line, each with a home of its own, all gone when a test ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

PATIENCE = 120.0
"""Seconds a process may take to say or do what it should: a loaded machine is slow, and an idle one does not wait."""


class Process:
    """A running command; `wait_for` a text in what it prints."""

    def __init__(self, command: Sequence[str] | str, env: Mapping[str, str], cwd: Path) -> None:
        self.popen = subprocess.Popen(
            command,
            shell=isinstance(command, str),
            executable="/bin/bash" if isinstance(command, str) else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            env=dict(env),
            cwd=cwd,
            start_new_session=True,
        )
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.popen.stdout or ():
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    @property
    def output(self) -> str:
        """All it has printed so far."""
        return "".join(self._lines)

    def wait_for(self, text: str) -> str:
        """The line that holds `text`. Fails when the process ends without it."""
        until = time.monotonic() + PATIENCE
        with self._changed:
            while text not in self.output:
                if not self._reader.is_alive() or time.monotonic() > until:
                    pytest.fail(f"{text!r} did not come:\n{self.output}")
                self._changed.wait(0.2)
        return next(line for line in self.output.splitlines() if text in line)

    def wait(self) -> int:
        code = self.popen.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def end(self) -> None:
        """Ends it and what it started, in order if it can, at once if it must."""
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGTERM)
            try:
                self.popen.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.popen.pid, signal.SIGKILL)
                self.popen.wait()
        self._reader.join(PATIENCE)
        if self.popen.stdout is not None:
            self.popen.stdout.close()


Spawn = Callable[..., Process]


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """The environment of a user whose home is `tmp_path/home`, with this environment's commands on the path."""
    folder = tmp_path / "home"
    folder.mkdir()
    kept = {name: os.environ[name] for name in ("PYTHONPATH", "LANG", "OMP_NUM_THREADS", "SYSTEMROOT") if name in os.environ}
    return {
        **kept,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HOME": str(folder),
        "CAKE_CONFIG_DIR": str(folder / "config"),
        "CAKE_CACHE_DIR": str(folder / "cache"),
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "CAKE_WORKERS": "none",
    }


@pytest.fixture
def spawn(home: dict[str, str], tmp_path: Path) -> Iterator[Spawn]:
    """`spawn(command, env=None)` starts a command, a list or a line for bash, in the test's folder."""
    processes: list[Process] = []

    def start(command: Sequence[str] | str, env: Mapping[str, str] | None = None) -> Process:
        processes.append(Process(command, home if env is None else env, tmp_path))
        return processes[-1]

    yield start
    for process in processes:
        process.end()


@pytest.fixture
def free_address() -> Callable[[], str]:
    """`free_address()` gives a loopback address whose port is free."""

    def pick() -> str:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return f"127.0.0.1:{server.getsockname()[1]}"

    return pick
