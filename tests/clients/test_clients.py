"""The clients that people use, each in an environment of its own, against a real model split over two workers: chat,
streams, a tool called and answered, JSON of a given schema, embeddings, errors as their own classes, leaving."""

from __future__ import annotations

import base64
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.clients.cluster_rig import Cluster
from tests.clients.environments import Environment, node_environment

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]

UNITS = ["celsius", "fahrenheit"]
WEATHER = {
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Bonn", "Rome"]}, "unit": {"enum": UNITS}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "people": {"type": "integer", "minimum": 0, "maximum": 9999},
        "river": {"type": "boolean"},
    },
    "required": ["name", "people", "river"],
    "additionalProperties": False,
}
LONG = [{"role": "user", "content": "word " * 9000}]
MISTAKES = {"value": {"top_p": 5}, "model": {"model": "another"}, "length": {"messages": LONG}}
EXPECTED = {"value": 400, "model": 404, "length": 400}


@pytest.fixture
def variables(served: Cluster) -> dict[str, str]:
    facts = {"WEATHER": WEATHER, "SCHEMA": SCHEMA, "MISTAKES": MISTAKES}
    return {"BASE_URL": f"{served.url}/v1", "MODEL": "smol", **{name: json.dumps(value) for name, value in facts.items()}}


def check(found: dict[str, Any], served: Cluster) -> None:
    """What every client must have seen."""
    assert found["streamed"] == found["whole"] != ""
    assert found["usage"]["completion_tokens"] <= 12
    assert found["usage"]["prompt_tokens"] > 10
    for name, arguments in (found["call"], found["streamed_call"]):
        assert name == "weather"
        assert arguments["city"] in ("Bonn", "Rome")
        assert arguments["unit"] in UNITS
    assert found["call"] == found["streamed_call"]
    assert found["after_call"]
    check_city(found["shaped"])
    assert found["vectors"][1] == pytest.approx(found["plain"], abs=1e-6)
    assert sum(value * value for value in found["plain"]) == pytest.approx(1, abs=1e-4)
    assert {name: error[1] for name, error in found["errors"].items()} == EXPECTED
    assert served.idle(5), "who leaves frees what was being generated"


def check_city(value: Any) -> None:
    assert set(value) == set(SCHEMA["properties"])
    assert isinstance(value["name"], str)
    assert isinstance(value["river"], bool)
    assert 0 <= value["people"] <= 9999


def test_openai(environment: Callable[..., Environment], variables: dict[str, str], served: Cluster) -> None:
    found = environment("openai==3.57.0").observe("openai_sdk.py", variables)
    check(found, served)
    assert found["errors"] == {
        "value": ["BadRequestError", 400, "top_p", None],
        "model": ["NotFoundError", 404, "model", "model_not_found"],
        "length": ["BadRequestError", 400, "messages", "context_length_exceeded"],
    }


def test_openai_for_node(tmp_path: Path, variables: dict[str, str], served: Cluster) -> None:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("needs node and npm")
    found = node_environment(tmp_path / "node", node, npm, "openai@6.49.0").observe("openai_sdk.mjs", variables)
    check(found, served)
    assert found["errors"]["value"] == ["BadRequestError", 400, "top_p", None]


def test_litellm(environment: Callable[..., Environment], variables: dict[str, str], served: Cluster) -> None:
    found = environment("litellm==1.110.2").observe("litellm_client.py", variables)
    check(found, served)
    packed = [struct.unpack(f"<{len(raw) // 4}f", raw) for raw in map(base64.b64decode, found["packed"])]
    assert packed[1] == pytest.approx(found["plain"], abs=1e-6)
    assert (found["errors"]["value"][0], found["errors"]["model"][0]) == ("BadRequestError", "NotFoundError")


def test_langchain(environment: Callable[..., Environment], variables: dict[str, str], served: Cluster) -> None:
    found = environment("langchain-openai==1.7.4").observe("langchain_client.py", variables)
    check(found, served)
    check_city(found["shaped_by_tool"])


def test_llm_in_a_shell(environment: Callable[..., Environment], variables: dict[str, str], served: Cluster) -> None:
    """Its own configuration file; what it prints; a schema; an error; and what was said before."""
    llm = environment("llm==0.36")
    smol = {"model_id": "cake", "model_name": "smol", "api_base": variables["BASE_URL"], "supports_schema": True}
    (llm.folder / "extra-openai-models.yaml").write_text(
        json.dumps([smol, {**smol, "model_id": "no", "model_name": "another"}])
    )
    env = {"LLM_USER_PATH": str(llm.folder), "OPENAI_API_KEY": "none"}

    def say(*arguments: str) -> str:
        return llm.run([llm.command, "-m", "llm", *arguments], env).strip()

    ask = ["-m", "cake", "-o", "max_tokens", "12", "-o", "seed", "3"]
    assert say(*ask, "Name a colour.") == say(*ask, "--no-stream", "Name a colour.") != ""
    assert say(*ask, "-c", "Another one.")
    long = ["-m", "cake", "-o", "max_tokens", "200", "-o", "seed", "3"]
    check_city(json.loads(say(*long, "--schema", json.dumps(SCHEMA), "Describe Rome.")))
    with pytest.raises(AssertionError, match="'another' does not exist"):
        say("-m", "no", "hi")
    assert served.idle(5)
