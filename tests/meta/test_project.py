"""The distributions agree with one another, the docs with the code, and files stay readable."""

from __future__ import annotations

import ast
import configparser
import inspect
import re
import tomllib
from pathlib import Path

import pytest
from tests.meta.source import DISTRIBUTIONS, EVERY_MODULE, ROOT

import cake_core
from cake_core import hookspecs
from cake_core.testing import contracts

PROJECTS = {folder.name: tomllib.loads((folder / "pyproject.toml").read_text("utf-8")) for folder in DISTRIBUTIONS}

LONGEST_FILE = 280
LONGER_FILES = {"cake_core.model": 510}
"""The contract is read as a whole."""
LONGEST_FUNCTION = 50
LONGEST_KERNEL = 75
MOST_PARAMETERS = 8
KERNELS = frozenset(f"cake_llama.cuda.{name}" for name in ("kernels", "attention_kernels", "narrow_kernels", "narrow_matvec"))
"""Device code: a kernel takes each pointer and stride by itself."""


def hooks() -> list[str]:
    return sorted(name for name in vars(hookspecs) if name.startswith("cake_"))


def signature(name: str) -> str:
    """`def cake_x(...) -> ...` as hookspecs.py has it."""
    source = inspect.getsource(getattr(hookspecs, name))
    match = re.search(r"^def .*?:(?=\s*(#.*)?$)", source, re.MULTILINE)
    assert match
    return match[0].removesuffix(":")


@pytest.mark.parametrize("hook", hooks())
def test_every_hook_is_documented_with_its_signature(hook):
    documentation = inspect.getdoc(getattr(hookspecs, hook))
    assert documentation
    assert signature(hook) in (ROOT / "docs" / "plugins.md").read_text("utf-8")


def test_every_contract_is_in_the_docs():
    text = (ROOT / "docs" / "plugins.md").read_text("utf-8")
    assert all(name in text for name in contracts.__all__)


@pytest.mark.parametrize("name", PROJECTS)
def test_distributions_have_one_version_and_pin_each_other_to_it(name):
    project = PROJECTS[name]["project"]
    assert project["version"] == cake_core.__version__
    extras = project.get("optional-dependencies", {})
    everything = [*project.get("dependencies", []), *(item for items in extras.values() for item in items)]
    ours = {other["project"]["name"] for other in PROJECTS.values()}
    for requirement in everything:
        if (match := re.match(r"[a-z0-9-]+", requirement)) and match[0] in ours:
            assert requirement.endswith(f"=={cake_core.__version__}"), requirement


@pytest.mark.parametrize("name", PROJECTS)
def test_distributions_say_who_they_are(name):
    project, folder = PROJECTS[name]["project"], next(folder for folder in DISTRIBUTIONS if folder.name == name)
    assert project["name"] == name.replace("_", "-")
    assert project["requires-python"] == ">=3.11"
    assert project["license"] == "GPL-3.0-or-later"
    assert (folder / "LICENSE").read_text("utf-8") == (ROOT / "LICENSE").read_text("utf-8")
    assert (folder / project["readme"]).is_file()
    assert (folder / "src" / name / "py.typed").is_file()


def test_files_and_functions_stay_readable():
    too_long = []
    for module in EVERY_MODULE:
        lines = len(module.file.read_text("utf-8").splitlines())
        if lines > LONGER_FILES.get(module.name, LONGEST_FILE):
            too_long.append(f"{module.name}: {lines} lines")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                parameters = [a for a in (*node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
                # A kernel is one function of all its strides and shapes.
                kernel = module.name in KERNELS
                if length > (LONGEST_KERNEL if kernel else LONGEST_FUNCTION) or (
                    len(parameters) > MOST_PARAMETERS and not kernel
                ):
                    too_long.append(f"{module.name}.{node.name}: {length} lines, {len(parameters)} parameters")
    assert not too_long


def test_core_names_no_backend():
    """`if backend == "llama"` and its like are nobody's business in core."""
    names = re.compile(r"[\"'](llama|sd|tcp|quic|emoji)[\"']")
    allowed = {"cake_core.transport", "cake_core.topology"}  # the default scheme of an address
    for module in EVERY_MODULE:
        if module.name.startswith("cake_core") and module.name not in allowed and ".cli." not in module.name:
            assert not names.search(module.file.read_text("utf-8")), module.name


def test_what_is_marked_full_runs_in_the_full_run():
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", "utf-8")
    environments = re.findall(r"\w+", tox["tox"]["labels"].split("full =")[1])
    commands = [line for name in environments for line in tox[f"testenv:{name}"]["commands"].splitlines()]
    folders = {word for line in commands if "not full" not in line for word in re.findall(r"\btests/\w+", line)}
    marked = {path for path in (ROOT / "tests").rglob("*.py") if "mark.full" in path.read_text("utf-8")} - {Path(__file__)}
    assert marked
    assert {
        str(path.relative_to(ROOT)) for path in marked if f"tests/{path.relative_to(ROOT).parts[1]}" not in folders
    } == set()
