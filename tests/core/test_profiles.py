"""Profiles: what goes through JSON comes back, and what is wrong is named."""

from __future__ import annotations

import json

import pytest

from cake_core.errors import ConfigError
from cake_core.profiles import ClusterProfile, DeviceProfile, LinkProfile, NodeProfile

CPU = DeviceProfile("cpu", 8_000_000_000, 25e9, "bf16", 16_000_000_000, 1e-4, 1e-5, {"bf16": 2e11}, {"int4": 2e10}, "EPYC")


def cluster() -> ClusterProfile:
    links = {("master", "a"): LinkProfile(1e-3, 1e8), ("b", "master"): LinkProfile(2e-3, 5e7)}
    return ClusterProfile(NodeProfile("master", (CPU,), 5.0), (NodeProfile("a", (CPU,)), NodeProfile("b", (CPU,))), links)


def test_profiles_go_through_json():
    whole = cluster()
    assert ClusterProfile.from_fields(json.loads(json.dumps(whole.as_fields()))) == whole


def test_little_need_be_written_by_hand():
    device = DeviceProfile.from_fields({"device": "cuda:0", "memory_free": 23e9, "bandwidth": 9e11})
    assert device == DeviceProfile("cuda:0", 23_000_000_000, 9e11)


def test_links_hold_for_both_directions_and_workers_are_as_far_as_the_farther():
    whole = cluster()
    assert whole.link("a", "master") == whole.link("master", "a") == LinkProfile(1e-3, 1e8)
    assert whole.link("a", "b") == LinkProfile(2e-3, 5e7)
    assert whole.link("b", "master").one_way(5e6) == pytest.approx(1e-3 + 0.1)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("master", "devices", 0, "bandwidth"), "fast", "bandwidth must be a number"),
        (("master", "devices", 0, "bandwidth"), 0, "bandwidth must be more than 0"),
        (("master", "devices", 0, "memory_free"), -1, "memory_free must be a number of at least 0"),
        (("master", "devices", 0, "memory_free"), float("nan"), "memory_free"),
        (("master", "devices", 0, "flops"), {"bf16": 0}, "positive"),
        (("master", "devices", 0, "colour"), "red", "unknown 'colour'"),
        (("master", "devices"), [], "no device"),
        (("master", "name"), "a", "called 'master'"),
        (("nodes", 0, "name"), "b", "two nodes are called 'b'"),
        (("nodes", 0, "name"), 7, "name must be a short text"),
        (("nodes",), {"a": 1}, "nodes must be a list"),
        (("links", 0, "between"), ["master", "c"], "no two nodes"),
        (("links", 0, "between"), ["master"], "two names"),
        (("links", 0, "rate"), 0, "a link cannot have"),
        (("links",), [], "nothing is known of the link to 'a'"),
    ],
)
def test_what_is_wrong_is_named(path, value, words):
    fields = json.loads(json.dumps(cluster().as_fields()))
    *way, last = path
    target = fields
    for step in way:
        target = target[step]
    target[last] = value
    with pytest.raises(ConfigError, match=words):
        ClusterProfile.from_fields(fields)


def test_one_device_twice_is_refused():
    with pytest.raises(ConfigError, match="twice"):
        NodeProfile("a", (CPU, CPU))
