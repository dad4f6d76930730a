"""`cake topology plan` with profiles: the table, JSON, and the topology file it writes."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from cake_core.cli.main import make_cli
from cake_core.plugins import Plugins
from cake_core.topology import load_topology


@pytest.fixture
def profiles(tmp_path):
    def device(free: float, bandwidth: float) -> list[dict[str, object]]:
        return [{"device": "cpu", "memory_free": free, "bandwidth": bandwidth, "flops": {"f32": 1e9}}]

    whole = {
        "master": {"name": "master", "devices": device(1, 1e6)},
        "nodes": [{"name": "tower", "host": "tower:10128", "devices": device(1e12, 1e9)},
                  {"name": "phone", "devices": device(1, 1e9)}],
        "links": [{"between": ["master", name], "round_trip": 1e-3, "rate": 1e8} for name in ("tower", "phone")],
    }  # fmt: skip
    path = tmp_path / "profiles.json"
    path.write_text(json.dumps(whole))
    return path


def plan(*words: object) -> Result:
    return CliRunner().invoke(make_cli(Plugins(entries=())), ["topology", "plan", "--model", "toy", *map(str, words)])


def run(*words: object) -> str:
    done = plan(*words)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_table_names_nodes_speeds_and_who_is_left_out(profiles):
    said = run("--profiles", profiles)
    assert "tower" in said.splitlines()[1]
    assert "ms a token" in said
    assert "left out: phone no room" in said
    assert "one machine alone is fastest: tower" in said


def test_json_and_the_written_topology_say_the_same(profiles, tmp_path):
    made = json.loads(run("--profiles", profiles, "--json"))
    run("--profiles", profiles, "--write", tmp_path / "t.yml")
    written = load_topology(tmp_path / "t.yml")
    assert [stage["node"] for stage in made["stages"]] == ["tower"]
    assert written.node("tower").host is not None
    assert "lm_head" in written.node("tower").layers


@pytest.mark.parametrize(("text", "words"), [("{", "not JSON"), ("{}", "master"), (None, "cannot read")])
def test_profiles_that_are_none_are_told(tmp_path, text, words):
    path = tmp_path / "p.json"
    if text is not None:
        path.write_text(text)
    done = plan("--profiles", path)
    assert done.exit_code == 2
    assert words in done.stderr


def test_writing_needs_a_plan(tmp_path):
    done = plan("--write", tmp_path / "t.yml")
    assert done.exit_code == 2
    assert "--write needs a plan" in done.stderr
