"""Environments of other people's software, each by itself: clients pin versions that exclude one another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(frozen=True)
class Environment:
    """What runs scripts: an interpreter, or node, in a folder of its own, which is its home as well."""

    folder: Path
    command: str

    @property
    def scripts(self) -> Path:
        """Where its commands are."""
        return Path(self.command).parent

    def run(self, command: Sequence[str | Path], variables: Mapping[str, str], timeout: float = 110) -> str:
        """What the command printed. Its failure is the test's, with what it said."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "SYSTEMROOT") if name in os.environ}
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(self.folder / "huggingface")}
        env = {**kept, **offline, "HOME": str(self.folder), **variables}
        done = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            env=env,
            cwd=self.folder,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"{command}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    def observe(self, script: str, variables: Mapping[str, str]) -> Any:
        """Runs one of our scripts; the last line it prints is JSON."""
        return json.loads(self.run([self.command, self._place(script)], variables).splitlines()[-1])

    def _place(self, script: str) -> Path:
        """Node resolves packages from where a script lies."""
        target = self.folder / script
        target.write_text((SCRIPTS / script).read_text("utf-8"), "utf-8")
        return target


def python_environment(folder: Path, *requirements: str, borrow: bool = False) -> Environment:
    """A virtual environment with these packages; `borrow` lets it see the ones of this environment behind its own."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, capture_output=True, timeout=60)
    interpreter = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet", "--no-compile", *requirements]
    done = subprocess.run([str(word) for word in pip], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    if borrow:
        site = next((folder / "lib").glob("python*/site-packages"), folder / "Lib" / "site-packages")
        (site / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return Environment(folder, str(interpreter))


def node_environment(folder: Path, node: str, npm: str, *packages: str) -> Environment:
    """A folder with these packages in its `node_modules`."""
    folder.mkdir(parents=True)
    (folder / "package.json").write_text('{"private": true}')
    install = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error", *packages]
    done = subprocess.run(install, capture_output=True, text=True, cwd=folder, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return Environment(folder, node)
