"""Every distribution builds, and installs with what it declares into an environment where nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    path.parent.name: path.parent for pattern in ("cake_*", "plugins/*") for path in ROOT.glob(f"{pattern}/pyproject.toml")
}

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

INSTALLS = {
    "core alone": (["cake-core"], "run --model toy --seed 1 Hello"),
    "cluster": (["cake-core[cluster]"], "serve --help"),
    "text": (["cake-core", "cake-llama"], "run --help"),
    "images": (["cake-core", "cake-emoji"], "run --help"),
}
WITH_TORCH = ("text", "images")
PIP = ("-m", "pip", "install", "--quiet", "--no-compile", "--constraint", ROOT / "constraints.txt")


def run(*command: str | Path, **options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CAKE_"))}
    done = subprocess.run(
        list(map(str, command)), env={**environment, **options}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of every distribution, built from its source distribution as for a release."""
    folder = tmp_path_factory.mktemp("wheels")
    for source in FOLDERS.values():
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source)
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_wheels_hold_what_they_need(wheels: Path, name: str) -> None:
    (wheel,) = wheels.glob(f"{name}-*.whl")
    source = FOLDERS[name] / "src"
    expected = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    expected = {path for path in expected if "__pycache__" not in path and not path.endswith((".so", ".egg-info"))}
    found = set(zipfile.ZipFile(wheel).namelist())
    assert expected <= found
    assert any(path.endswith("licenses/LICENSE") for path in found)


@pytest.fixture(scope="session")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with torch and not even what it needs: unpacking it once for every environment takes minutes."""
    folder = tmp_path_factory.mktemp("big")
    run(sys.executable, *PIP, "--no-deps", "--target", folder, "torch")
    return folder


@pytest.mark.parametrize("install", INSTALLS)
def test_installs_into_a_clean_environment(wheels: Path, tmp_path: Path, install: str, request: pytest.FixtureRequest) -> None:
    requirements, command = INSTALLS[install]
    venv.create(tmp_path / "env", with_pip=True)
    bin_folder = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    if install in WITH_TORCH:
        (packages,) = (tmp_path / "env").glob("**/site-packages")
        (packages / "big.pth").write_text(str(request.getfixturevalue("big")), "utf-8")
    # Our own come from the wheels just built, which is what the exact version asks for; the rest from the index.
    run(bin_folder / "python", *PIP, "--find-links", wheels, *requirements)
    homes = {name: str(tmp_path) for name in ("HOME", "CAKE_CONFIG_DIR", "CAKE_CACHE_DIR", "HF_HOME")}
    assert run(bin_folder / "cake", *command.split(), **homes).stdout.strip()
    plugins = run(bin_folder / "cake", "plugins", **homes).stdout
    assert "Traceback" not in plugins
    run(bin_folder / "python", "-m", "pip", "check")
