"""docs/cli.md shows the help that the commands print."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "docs_cli.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_cli", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(text: str) -> list[str]:
    """The words of a help text without the rows of positional arguments that newer click adds, however it is wrapped."""
    return re.sub(r"[\[\]]", " ", text).split()


def test_the_page_is_up_to_date(script: ModuleType) -> None:
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    shown = dict(re.findall(r"^## `(.+?)`\n\n```text\n(.*?)\n```$", page, re.DOTALL | re.MULTILINE))
    real = dict(script.helps())
    assert list(shown) == list(real)
    for name, text in real.items():
        assert words(shown[name]) == words(text), f"run `python tools/docs_cli.py`: {name} --help has changed"
