"""The command line over the toy models: what goes where, exit codes, and messages instead of tracebacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cake_core.cli.main import COMMANDS, make_cli
from cake_core.plugins import Plugins


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CAKE_CONFIG_DIR", "CAKE_CACHE_DIR", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def cake(*args: str, stdin: str | None = None) -> Result:
    """Runs `cake` with no plugin but core's own."""
    return CliRunner().invoke(make_cli(Plugins(entries=())), args, input=stdin)


def failure(result: Result, code: int) -> str:
    """The one-line message of a command that failed as it should."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line.lower().startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_stdout_holds_the_answer_alone() -> None:
    first, second = (cake("run", "--model", "toy", "--seed", "7", "--max-tokens", "12", "hello") for _ in range(2))
    assert first.exit_code == 0, first.output
    assert first.stdout == second.stdout
    assert first.stdout.endswith("\n")
    assert first.stdout.count("\n") == 1
    for shown in ("master", "model.layers.0-3", "seed 7", "time to first token", "tokens/s"):
        assert shown in first.stderr


def test_a_random_seed_is_printed_and_gives_the_same_answer_again() -> None:
    first = cake("run", "--model", "toy", "hello")
    seed = first.stderr.split("seed ")[1].split(",")[0]
    assert cake("run", "--model", "toy", "--seed", seed, "hello").stdout == first.stdout


@pytest.mark.parametrize("arguments", [("-",), ()], ids=["dash", "none"])
def test_the_prompt_comes_from_stdin(arguments: tuple[str, ...]) -> None:
    options = ("run", "--model", "toy", "--seed", "1", "--max-tokens", "8")
    assert cake(*options, *arguments, stdin="hello\n").stdout == cake(*options, "hello").stdout


def test_raw_and_chat_prompts_differ() -> None:
    options = ("run", "--model", "toy", "--temperature", "0", "--max-tokens", "8", "hello")
    assert cake(*options, "--raw").stdout != cake(*options).stdout


def test_a_stop_string_ends_the_answer() -> None:
    options = ("run", "--model", "toy", "--seed", "1", "--max-tokens", "12")
    whole = cake(*options, "hello").stdout.rstrip("\n")
    assert cake(*options, "--stop", whole[4:6], "hello").stdout.rstrip("\n") == whole[:4]


def test_images_are_written_with_their_seed(tmp_path: Path) -> None:
    target = tmp_path / "apple.png"
    result = cake("run", "--model", "toy-image", "--seed", "3", "-o", str(target), "a red apple")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    data = target.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert b"Seed\x003" in data


def test_several_images_and_steps_get_names_of_their_own(tmp_path: Path) -> None:
    options = ("--n", "2", "--steps", "4", "--preview-every", "2", "-o", str(tmp_path / "a.png"))
    result = cake("run", "--model", "toy-image", *options, "a red apple")
    assert result.exit_code == 0, result.output
    names = {path.name for path in tmp_path.glob("*.png")}
    assert {"a-1.png", "a-2.png"} < names
    assert any(name.startswith("a-1-step") for name in names)


def test_an_image_can_go_to_stdout() -> None:
    result = cake("run", "--model", "toy-image", "-o", "-", "a red apple")
    assert result.exit_code == 0, result.stderr
    assert result.stdout_bytes.startswith(b"\x89PNG")


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


TOPOLOGY = "left:\n  host: 'left:10128'\n  description: 'a laptop'\n  layers: ['model.layers.0-1']\n"


def test_topology_plan_as_table_and_json(tmp_path: Path) -> None:
    topology = write(tmp_path / "t.yml", TOPOLOGY)
    table = cake("topology", "plan", "--model", "toy", "--topology", topology).stdout
    assert [line.split()[0] for line in table.splitlines()] == ["node", "master", "left", "master"]
    plan = json.loads(cake("topology", "plan", "--model", "toy", "--topology", topology, "--json").stdout)
    assert [span["nodes"] for span in plan["spans"]] == [["master"], ["left"], ["master"]]
    assert sum(span["bytes"] for span in plan["spans"]) == plan["bytes"]


def test_topology_check_and_show(tmp_path: Path) -> None:
    topology = write(tmp_path / "t.yml", TOPOLOGY)
    assert "2 of 7 layers" in cake("topology", "check", topology, "--model", "toy").stdout
    assert "1 node with 2 layers" in cake("topology", "check", topology).stdout
    assert "a laptop" in cake("topology", "show", topology).stdout
    shown = json.loads(cake("topology", "show", topology, "--json").stdout)
    assert shown == [
        {
            "name": "left",
            "host": "tcp://left:10128",
            "description": "a laptop",
            "layers": ["model.layers.0", "model.layers.1"],
        }
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("left: [", "not valid YAML"),
        ("left:\n  hots: 'a:1'\n  layers: []\n", "did you mean 'host'"),
        ("left:\n  host: 'a:1'\n  layers: ['model.layrs.0']\n", "did you mean model.layers.0"),
        ("left:\n  host: 'a:1'\n  layers: ['model.layers.3-1']\n", "runs backwards"),
        ("a:\n  host: 'a:1'\n  layers: ['lm_head']\nb:\n  host: 'b:1'\n  layers: ['lm_head']\n", "'a' and 'b'"),
        ("left:\n  host: 'a:99999'\n  layers: []\n", "not a port"),
    ],
)
def test_a_bad_topology_is_a_message(tmp_path: Path, text: str, message: str) -> None:
    topology = write(tmp_path / "t.yml", text)
    assert message in failure(cake("topology", "check", topology, "--model", "toy"), 2)


def test_no_transport_for_a_scheme(tmp_path: Path) -> None:
    topology = write(tmp_path / "t.yml", "left:\n  host: 'warp://a:1'\n  layers: ['lm_head']\n")
    result = cake("run", "--model", "toy", "--topology", topology, "--insecure", "hello")
    assert "no transport for warp://" in failure(result, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", "-1"), "temperature must be 0 or more"),
        (("--top-p", "3"), "top_p must be between 0 and 1"),
        (("--top-k", "-1"), "top_k must be 0"),
        (("--min-p", "nan"), "min_p must be between 0 and 1"),
        (("--repeat-penalty", "0"), "repeat_penalty must be above 0"),
        (("--repeat-last-n", "-2"), "repeat_last_n"),
        (("--max-tokens", "-1"), "max_tokens must be 0 or more"),
        (("--seed", "-1"), "seed must be between 0"),
        (("--stop", ""), "stop string must not be empty"),
        (("--dtype", "f8"), "unsupported dtype 'f8'"),
        (("--quantize", "int3"), "--quantize is one of none, int8, int4"),
        (("--kv-dtype", "q8"), "--kv-dtype is one of"),
        (("--wire-dtype", "q8"), "--wire-dtype is one of"),
        (("--speculate", "often"), "--speculate is auto, off, lookup or a number"),
        (("--speculate", "0"), "--speculate is auto, off, lookup or a number"),
        (("--speculate", "off", "--draft", "toy"), "--draft guesses"),
        (("--threads", "0"), "--threads must be at least 1"),
        (("--context", "0"), "--context must be at least 1"),
        (("-o", "x.png"), "--model-type image"),
    ],
)
def test_a_bad_value_is_a_message(arguments: tuple[str, ...], message: str) -> None:
    assert message in failure(cake("run", "--model", "toy", *arguments, "hello"), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--width", "63"), "width must be a positive multiple of 8"),
        (("--steps", "0"), "steps must be at least 1"),
        (("--n", "0"), "images must be at least 1"),
        (("--strength", "2"), "strength must be between 0 and 1"),
        (("--init-image", "/nowhere.png"), "cannot read the image"),
        (("--mask", "x.png"), "--mask needs --init-image"),
        (("-o", "/nowhere/at/all/x.png"), "there is no folder"),
    ],
)
def test_a_bad_image_value_is_a_message(arguments: tuple[str, ...], message: str) -> None:
    assert message in failure(cake("run", "--model", "toy-image", *arguments, "an apple"), 2)


def test_a_prompt_longer_than_the_context() -> None:
    result = cake("run", "--model", "toy", "--context", "16", "hello " * 20)
    assert "context" in failure(result, 2)


def test_an_empty_prompt() -> None:
    assert "the prompt is empty" in failure(cake("run", "--model", "toy", stdin=""), 2)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is empty"),
        ({"config.json": "{"}, "not valid JSON"),
        ({"config.json": '{"architectures": ["NobodyForCausalLM"]}', "model.safetensors": ""}, "NobodyForCausalLM"),
        ({"model.safetensors": ""}, "no config.json"),
    ],
)
def test_a_bad_model_folder_is_a_message(tmp_path: Path, files: dict[str, str], message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    assert message in failure(cake("run", "--model", str(folder), "hello"), 2)


@pytest.mark.parametrize("reference", ["/nowhere", "./nowhere", "no such model"])
def test_a_model_that_is_not_there(reference: str) -> None:
    assert "no model at" in failure(cake("run", "--model", reference, "hello"), 2)


def test_a_hub_model_offline_is_a_message() -> None:
    assert "offline" in failure(cake("run", "--model", "some-org/some-model", "hello"), 2).lower()


def test_an_unknown_command_suggests_one() -> None:
    result = cake("chart")
    assert result.exit_code == 2
    assert "did you mean 'chat'" in result.stderr


def test_serve_without_the_server_says_how_to_get_it() -> None:
    assert "pip install cake-server" in failure(cake("serve", "--model", "toy"), 2)


def test_unknown_model_type_and_version() -> None:
    assert cake("run", "--model-type", "audio", "x").exit_code == 2
    assert cake("--version").stdout.startswith("cake, version ")


def test_plugins_and_doctor_as_json() -> None:
    core = next(p for p in json.loads(cake("plugins", "--json").stdout) if p["name"] == "core")
    assert core["error"] is None
    assert "backend toy" in core["provides"]


def test_every_command_has_help() -> None:
    for name in COMMANDS:
        result = cake(name, "--help")
        assert result.exit_code == 0, result.output
        assert "Usage:" in result.stdout


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("cake_core.cli.run.read_prompt", broken)
    assert isinstance(cake("run", "--model", "toy", "x").exception, ZeroDivisionError)
