"""What the containers would run, without an engine: entry points, options, folders, the key. The image itself is not built."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from cake_core.cli.seed import cake_cli_command, cake_split_model_command, translate
from cake_core.config import load_options
from cake_core.security.keys import obtain_key

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
COMMANDS = {
    "cake-split-model": "--model-path /data/Meta-Llama-3-8B --topology /data/topology.yml --output /data/output-folder-name",
    "worker": "--model /data/Meta-Llama-3-8B --mode worker --name worker0 "
    "--topology /data/topology.yml --address 0.0.0.0:10128",
    "master": "--model /data/Meta-Llama-3-8B --api 0.0.0.0:8080 --topology /data/topology.yml",
}
"""The arguments of the original's three Docker commands."""


def test_the_image_copies_and_installs_what_there_is() -> None:
    for source in re.findall(r"^COPY (?!--from)(\S+) ", DOCKERFILE, re.MULTILINE):
        assert (ROOT / source).is_dir()
    installed = re.findall(r'"?\./([\w/]+)(?:\[[\w,]+\])?"?', DOCKERFILE.partition("RUN")[2].partition("FROM")[0])
    assert {"cake_core", "cake_server", "plugins/cake_llama", "plugins/cake_sd", "plugins/cake_transport_tcp"} <= set(installed)
    assert all((ROOT / folder / "pyproject.toml").is_file() for folder in installed)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    assert {"!cake_core", "!cake_server", "!plugins"} <= set(ignored)


def test_the_commands_are_entry_points() -> None:
    scripts = {entry.name for entry in entry_points(group="console_scripts")}
    used = {service["command"].split()[0] for service in COMPOSE["services"].values()} | {"cake-split-model"}
    used |= set(re.findall(r'CMD \["([\w-]+)"', DOCKERFILE))
    assert used <= scripts


def _read(arguments: str) -> dict[str, object]:
    context = cake_cli_command.make_context("cake-cli", shlex.split(arguments))
    return dict(context.params)


@pytest.mark.parametrize("arguments", [COMMANDS["worker"], COMMANDS["master"]])
def test_the_originals_arguments_are_understood(arguments: str) -> None:
    command, _ = translate(_read(arguments))
    assert command[0] == ("worker" if "--mode worker" in arguments else "serve")
    assert "/data/Meta-Llama-3-8B" in command
    assert "/data/topology.yml" in command


def test_the_originals_splitter_is_understood() -> None:
    context = cake_split_model_command.make_context("cake-split-model", shlex.split(COMMANDS["cake-split-model"]))
    assert context.params["output"] == "/data/output-folder-name"
    assert CliRunner().invoke(cake_split_model_command, ["--help"]).exit_code == 0


@pytest.mark.parametrize("service", COMPOSE["services"])
def test_services_run_what_is_understood(service: str) -> None:
    entry = COMPOSE["services"][service]
    command = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", entry["command"])
    program, _, arguments = command.partition(" ")
    assert program == "cake-cli"
    translated, _ = translate(_read(arguments))
    assert translated[0] == ("serve" if service == "master" else "worker")
    assert entry["volumes"] == ["${DATA:-./cake-data}:/data"]


def test_containers_of_one_folder_share_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = dict(re.findall(r"^\s*(?:ENV )?(\w+)=(\S+)", DOCKERFILE.partition("ENV ")[2], re.MULTILINE))
    assert variables["CAKE_CONFIG_DIR"].startswith("/data/")
    assert variables["HF_HOME"].startswith("/data/")
    monkeypatch.delenv("CAKE_CLUSTER_KEY", raising=False)
    monkeypatch.delenv("CAKE_CLUSTER_KEY_FILE", raising=False)
    monkeypatch.setenv("CAKE_CONFIG_DIR", str(tmp_path / "cake"))
    made = obtain_key(None, load_options().config_dir)
    found = obtain_key(None, load_options().config_dir)
    assert made.made
    assert not found.made
