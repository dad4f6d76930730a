"""The documentation is run: its curl lines against real servers, its metrics and the dashboard's against /metrics."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import httpx
import pytest

from cake_core.cli.main import COMMANDS, make_cli
from cake_core.plugins import Plugins
from cake_core.runtime import ImageRuntime, TextRuntime
from cake_server.commands import serve, status

DOCS = Path(__file__).parents[2] / "docs"
API = (DOCS / "api.md").read_text("utf-8")
OPERATIONS = (DOCS / "operations.md").read_text("utf-8")


def commands(text: str) -> list[str]:
    """Each curl of the shell blocks, its continuation lines included."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    return [command for command in re.split(r"^(?=curl )", blocks, flags=re.MULTILINE) if command.startswith("curl ")]


CURLS = commands(API)


def test_there_is_something_to_run() -> None:
    assert len(CURLS) >= 12


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("command", CURLS)
def test_every_curl_line_works(
    command: str, tmp_path: Path, start: Any, runtime: TextRuntime, image_runtime: ImageRuntime
) -> None:
    server = start(image_runtime if "image" in command else runtime)
    shown = command.replace("http://localhost:8080", server.url).replace("curl ", "curl --fail-with-body --max-time 30 ", 1)
    done = subprocess.run(["sh", "-c", shown], cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    if "-o " in command:
        assert (tmp_path / "image.png").read_bytes().startswith(b"\x89PNG")
    elif '"stream": true' in command:
        assert done.stdout.rstrip().endswith(b"data: [DONE]")
    else:
        json.loads(done.stdout)


def test_the_metrics_that_are_documented_and_drawn_exist(api: httpx.Client) -> None:
    """Also the other way round: a metric nobody is told of is of no use."""
    text = api.get("/metrics").text
    exported = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    exported = {name for name in exported if not name.endswith("_created")}
    assert exported - set(re.findall(r"\b(cake_\w+)", OPERATIONS)) == set()
    dashboard = json.loads((DOCS / "grafana.json").read_text("utf-8"))
    drawn = {
        name for panel in dashboard["panels"] for target in panel["targets"] for name in re.findall(r"cake_\w+", target["expr"])
    }
    assert {name.removesuffix("_bucket") for name in drawn} <= exported


def test_every_endpoint_of_the_table_exists(api: httpx.Client) -> None:
    document = api.get("/schema/openapi.json").json()
    known = {re.sub(r"\{\w+\}", "{}", path) for path in document["paths"]}
    table = API.split("## Chat")[0]
    for path in re.findall(r"`(?:GET|POST|DELETE)? ?(/[\w/.-]*(?:\{\w+\})?)`", table):
        assert re.sub(r"\{\w+\}", "{}", path) in known | {"/", "/docs", "/schema/openapi.json"}, path


def options_of(command: click.Command) -> set[str]:
    """Also those of its subcommands."""
    own = {name for parameter in command.params for name in parameter.opts}
    return own.union(*(options_of(child) for child in getattr(command, "commands", {}).values()))


def test_every_option_that_is_mentioned_exists() -> None:
    cli = make_cli(Plugins(entries=()))
    core = [cli.get_command(click.Context(cli), name) for name in COMMANDS]
    known = set[str]().union(*(options_of(command) for command in [serve, status, *core] if command is not None))
    serving = OPERATIONS.split("## Load")[0] + API
    mentioned = set(
        re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", re.sub(r"```python.*?```|lm_eval [^`]*", "", serving, flags=re.DOTALL))
    )
    assert mentioned <= known
