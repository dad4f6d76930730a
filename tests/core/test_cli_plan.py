"""`cake topology plan` with profiles: the table, JSON, and the topology file it writes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from cake_core.cli.main import make_cli
from cake_core.cli.options import ModelFlags
from cake_core.plugins import Plugins
from cake_core.topology import load_topology

ROOM = 5000
"""Bytes of which 92 % hold more than half of the toy model with its KV cache, and not all of it."""


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


def test_the_plan_makes_room_for_the_kv_cache_that_a_run_would_have(profiles):
    def needed(*words: object) -> int:
        return sum(stage["kv"] for stage in json.loads(run("--profiles", profiles, "--json", *words))["stages"])

    assert needed("--context", 64, "--kv-tokens", 640) == needed("--kv-tokens", 640) == 10 * needed("--context", 64) > 0


@pytest.mark.parametrize(("host", "like"), [("phone:10128", "chain"), (None, "star")])
def test_without_a_route_a_chain_is_planned_where_workers_can_be_dialled(tmp_path, host, like):
    """Neither of the two workers has room for the whole model, the master for none of it."""
    device = {"device": "cpu", "memory_free": 0, "bandwidth": 1e9}
    nodes = [{"name": "tower", "host": "tower:10128"}, {"name": "phone", **({"host": host} if host else {})}]
    whole = {
        "master": {"name": "master", "devices": [{**device, "memory_free": 1}]},
        "nodes": [{**node, "devices": [{**device, "memory_free": ROOM}]} for node in nodes],
        "links": [{"between": ["master", node["name"]], "round_trip": 1e-2, "rate": 1e8} for node in nodes],
    }
    path = tmp_path / "two.json"
    path.write_text(json.dumps(whole))

    def seconds(*words: object) -> float:
        return float(json.loads(run("--profiles", path, "--context", 64, "--json", *words))["prediction"]["seconds_per_token"])

    assert seconds() == seconds("--route", like)
    assert seconds("--route", "chain") < seconds("--route", "star")


def test_spread_plans_what_a_run_with_it_would_do(tmp_path):
    """The master alone would be fastest; shared out by memory everybody gets a part."""
    device = [{"device": "cpu", "memory_free": 1e9, "bandwidth": 1e9}]
    whole = {
        "master": {"name": "master", "devices": device},
        "nodes": [{"name": name, "host": f"{name}:10128", "devices": device} for name in ("tower", "phone")],
        "links": [{"between": ["master", name], "round_trip": 1e-2, "rate": 1e8} for name in ("tower", "phone")],
    }
    path = tmp_path / "three.json"
    path.write_text(json.dumps(whole))
    nodes = [
        {stage["node"] for stage in json.loads(run("--profiles", path, "--json", *more))["stages"]}
        for more in ([], ["--spread"])
    ]
    assert nodes == [{"master"}, {"master", "tower", "phone"}]
    fixed = tmp_path / "fixed.yml"
    fixed.write_text("phone:\n  host: 'phone:10128'\n  layers: ['model.layers.1']\n")
    made = json.loads(run("--profiles", path, "--json", "--spread", "--topology", fixed))
    assert [stage["layers"] for stage in made["stages"] if stage["node"] == "phone"] == [["model.layers.1"]]
    assert {stage["node"] for stage in made["stages"]} == {"master", "tower", "phone"}
    assert any("one machine alone would be faster" in line for line in made["advice"])


def test_workers_that_join_are_waited_for_as_long_as_was_said(monkeypatch):
    asked = []

    class Nobody:
        def __init__(self, _connector, wishes, _topology, _backend):
            asked.append(wishes)

        def everybody(self, _say):
            return []

    monkeypatch.setattr("cake_core.cluster.gathering.Search", Nobody)
    monkeypatch.setattr(ModelFlags, "connector", lambda *_: SimpleNamespace(close=lambda: None))
    made = json.loads(run("--listen", "127.0.0.1:0", "--wait", 3, "--insecure", "--json"))
    assert {stage["node"] for stage in made["stages"]} == {"master"}
    assert [(wishes.joining, wishes.wait, wishes.workers) for wishes in asked] == [(True, 3, ())]
