"""The topology file and its fit to a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cake_core.errors import TopologyError
from cake_core.model import Layer, ModelInfo
from cake_core.placement import Placement, Span, check_placement, place
from cake_core.topology import MASTER, Topology, compress, expand, load_topology, parse_topology
from cake_core.transport import Address

SEED = """\
linux_server_1:
  host: 'linux_server.host:10128'
  description: 'NVIDIA Titan X Pascal (12GB)'
  layers:
    - 'model.layers.0-5'
    - 'model.norm'
iphone:
  host: 'iphone.host'
  layers:
    - 'model.layers.6'
laptop:
"""


def test_reads_a_file(tmp_path):
    file = tmp_path / "topology.yml"
    file.write_text(SEED.replace("laptop:\n", ""), "utf-8")
    topology = load_topology(file)
    server, phone = topology.nodes
    assert server.host == Address("linux_server.host", 10128)
    assert server.description == "NVIDIA Titan X Pascal (12GB)"
    assert server.layers == (*(f"model.layers.{index}" for index in range(6)), "model.norm")
    assert phone.host == Address("iphone.host", 10128)
    assert topology.node("iphone") is phone


def test_an_empty_file_gives_everything_to_the_master(tmp_path):
    file = tmp_path / "topology.yml"
    file.write_text("", "utf-8")
    assert load_topology(file).nodes == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML.*line"),
        ("a: {layers: []}\na: {layers: []}", "found 'a' twice.*line 2"),
        ("- a", "must map node names.*list"),
        ("1: {layers: []}", "node names are text"),
        ("master: {layers: []}", "the master's own name"),
        ("a:", "node 'a' must have host and layers"),
        ("a: {hosts: x}", "unknown key 'hosts'; did you mean 'host'"),
        ("a: {colour: x}", r"unknown key 'colour' \(known: host"),
        ("a: {host: 7}", "host must be text"),
        ("a: {host: 'x:y'}", "node 'a'.*'y' is not a port"),
        ("a: {layers: model.norm}", "layers must be a list"),
        ("a: {layers: [1]}", "layers must be a list"),
        ("a: {layers: ['model.layers.5-2']}", "runs backwards; write model.layers.2-5"),
        ("a: {layers: ['model.layers.0-99999999']}", "too long"),
        ("a: {layers: ['x.1', 'x.0-1']}", "lists layer 'x.1' twice"),
        ("\ta: b", "not valid YAML"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, text, message):
    file = tmp_path / "topology.yml"
    file.write_text(text, "utf-8")
    with pytest.raises(TopologyError, match=message) as info:
        load_topology(file)
    assert str(file) in str(info.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(TopologyError, match="cannot read the topology"):
        load_topology(tmp_path / "missing.yml")
    (tmp_path / "latin").write_bytes(b"a: {host: \xff}")
    with pytest.raises(TopologyError, match="not UTF-8"):
        load_topology(tmp_path / "latin")


def test_a_name_that_is_not_there_suggests_the_nearest():
    topology = parse_topology({"worker_1": {"layers": []}, "worker_2": {"layers": []}})
    with pytest.raises(TopologyError, match=r"did you mean 'worker_1'\? \(it has: worker_1, worker_2\)"):
        topology.node("worker1")


@given(st.lists(st.tuples(st.sampled_from(["a.", "model.layers.", "b-"]), st.integers(0, 30)), unique=True, max_size=30))
def test_compress_and_expand_are_inverse(pairs):
    names = tuple(f"{prefix}{index}" for prefix, index in pairs)
    assert tuple(name for entry in compress((*names, "lm_head")) for name in expand(entry)) == (*names, "lm_head")


def model(*names: str, kind: str = "text", stateless: bool = False) -> ModelInfo:
    layers = tuple(Layer(name, 10, stateless=stateless) for name in names)
    return ModelInfo("toy", kind, "small", "Toy", layers)


TEXT = model("model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head")


def test_the_master_gets_what_nobody_lists():
    topology = parse_topology({"a": {"layers": ["model.layers.1-2"]}, "b": {"layers": ["lm_head"]}})
    placement = place(TEXT, topology)
    assert placement.spans == (
        Span((MASTER,), ("model.embed_tokens", "model.layers.0")),
        Span(("a",), ("model.layers.1", "model.layers.2")),
        Span((MASTER,), ("model.norm",)),
        Span(("b",), ("lm_head",)),
    )
    assert placement.nodes == (MASTER, "a", "b")
    assert placement.layers_of(MASTER) == ("model.embed_tokens", "model.layers.0", "model.norm")
    assert placement.table(TEXT)[1] == ("a", "model.layers.1-2", 20)
    check_placement(TEXT, placement, topology)


def test_layers_the_model_does_not_have_suggest_the_nearest():
    with pytest.raises(TopologyError, match=r"'a' lists 'model.layer.1', which small does not have; did you mean .*layers\.1"):
        place(TEXT, parse_topology({"a": {"layers": ["model.layer.1"]}}))
    with pytest.raises(TopologyError, match=r"it has model.embed_tokens, model.layers.0-2"):
        place(TEXT, parse_topology({"a": {"layers": ["zzz"]}}))


def test_a_layer_on_two_nodes_needs_to_be_stateless():
    topology = parse_topology({"a": {"layers": ["unet"]}, "b": {"layers": ["unet"]}})
    with pytest.raises(TopologyError, match="'unet' is on nodes 'a' and 'b'"):
        place(model("clip", "unet", kind="image"), topology)
    placement = place(model("clip", "unet", kind="image", stateless=True), topology)
    assert placement.spans == (Span((MASTER,), ("clip",)), Span(("a", "b"), ("unet",)))


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([Span((MASTER,), ("model.embed_tokens",))], "missing: model.layers.0"),
        ([Span((MASTER,), tuple(layer.name for layer in reversed(TEXT.layers)))], "in order"),
        ([Span(("ghost",), tuple(layer.name for layer in TEXT.layers))], "node 'ghost'"),
        ([Span((MASTER, "a"), tuple(layer.name for layer in TEXT.layers))], "keeps state"),
    ],
)
def test_any_planner_is_checked(spans, message):
    with pytest.raises(TopologyError, match=message):
        check_placement(TEXT, Placement(tuple(spans)), parse_topology({"a": {"layers": []}}))


def test_no_topology_is_one_node():
    assert place(TEXT, Topology()).nodes == (MASTER,)
