"""`cake-cli`'s options, translated into `cake`'s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from cake_core.cli.seed import cake_cli_command, translate


def translated(*arguments: str) -> tuple[list[str], dict[str, str]]:
    context = cake_cli_command.make_context("cake-cli", list(arguments))
    return translate(context.params)


def option(arguments: list[str], name: str) -> Any:
    """The value after an option, None where it is missing."""
    return arguments[arguments.index(name) + 1] if name in arguments else None


def test_the_originals_defaults() -> None:
    arguments, environment = translated()
    assert arguments[0] == "run"
    assert arguments[-2:] == ["--", "The sky is blue because "]
    expected = {
        "--model": "./cake-data/Meta-Llama-3-8B/",
        "--max-tokens": "100",
        "--temperature": "1.0",
        "--repeat-penalty": "1.1",
        "--repeat-last-n": "128",
        "--seed": "299792458",
        "--dtype": "f16",
        "--device": "auto",
        "--system-prompt": "You are a helpful AI assistant.",
        "--top-p": None,
        "--top-k": None,
    }
    assert {name: option(arguments, name) for name in expected} == expected
    assert environment == {}


def test_a_worker() -> None:
    arguments, _ = translated("--mode", "worker", "--name", "w", "--topology", "t.yml", "--address", "0.0.0.0:1", "--cpu")
    assert arguments[0] == "worker"
    expected = {"--name": "w", "--topology": "t.yml", "--address": "0.0.0.0:1", "--device": "cpu", "--max-tokens": None}
    assert {name: option(arguments, name) for name in expected} == expected


def test_the_second_gpu() -> None:
    assert option(translated("--device", "1")[0], "--device") == "cuda:1"


def test_a_master_with_an_api_hands_its_defaults_on() -> None:
    arguments, _ = translated("--api", "0.0.0.0:8080", "-n", "7", "--top-k", "5")
    assert arguments[0] == "serve"
    expected = {"--api": "0.0.0.0:8080", "--max-tokens": "7", "--top-k": "5", "--system-prompt": None}
    assert {name: option(arguments, name) for name in expected} == expected


@pytest.mark.parametrize("name", ["image", "image-model"])
def test_the_cache_that_image_models_come_from(tmp_path: Path, name: str) -> None:
    arguments, environment = translated("--model-type", name, "--model", str(tmp_path), "--api", "a:1", "--sd-width", "64")
    assert environment == {"HF_HUB_CACHE": str(tmp_path / "hub")}
    assert option(arguments, "--model") == "v1-5"
    assert option(arguments, "--sd-width") == "64"
    assert option(arguments, "--dtype") == "auto"
    assert "--max-tokens" not in arguments
    turbo, _ = translated("--model-type", name, "--model", str(tmp_path), "--api", "a:1", "--sd-version", "turbo")
    assert option(turbo, "--model") == "turbo"


def test_an_image_model_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    arguments, environment = translated("--model-type", "image-model", "--model", str(tmp_path), "--api", "a:1")
    assert option(arguments, "--model") == str(tmp_path)
    assert environment == {}


def test_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--sd-n-steps", "4", "--sd-num-samples", "2", "--sd-img2img-strength", "0.5", "--sd-seed", "3", "--no-sd-use-f16")
    arguments, _ = translated("--model-type", "image-model", *flags)
    assert arguments[-1] == "A very realistic photo of a rusty robot walking on a sandy beach"
    expected = {"--sd-n-steps": "4", "--sd-num-samples": "2", "--sd-img2img-strength": "0.5", "--sd-seed": "3"}
    assert {name: option(arguments, name) for name in expected} == expected
    assert "--no-sd-use-f16" in arguments
    assert option(arguments, "--output") == "images/image_0.png"
    assert translated("--model-type", "image-model", "--sd-image-prompt", "a cat")[0][-1] == "a cat"


def test_a_worker_needs_a_name() -> None:
    with pytest.raises(click.ClickException, match="no --name provided for worker"):
        translated("--mode", "worker")
